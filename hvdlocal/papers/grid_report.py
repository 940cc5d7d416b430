"""The results of a study beside the published ones, as data, as Markdown and in a few lines."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvdlocal.directory import write_text
from hvdlocal.papers.claims import CLAIMS, RULE, Point, Results, Scale, Verdict, check, judge
from hvdlocal.papers.published import Table, read_table
from hvdlocal.papers.runs import Outcome
from hvdlocal.papers.studies import BASELINE, GridPoint, Setup, Study


@dataclass(frozen=True)
class Row:
    """A method at one K and H, over all seeds that are done.

    Attributes:
        accuracies: in percent, one a seed; chance where it diverged.
        epochs: passes over the data, of those that did not.
        spread: of the accuracies, the standard deviation; None for one seed.
        seconds: from the first step to the last, of all together.
        published: accuracy in percent and epochs.
    """

    method: str
    workers: int
    period: int | None
    accuracies: list[float]
    epochs: list[float]
    diverged: int
    seconds: float
    published: tuple[float, int] | None

    @property
    def accuracy(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def mean_epochs(self) -> float | None:
        """Mean over the seeds that did not diverge."""
        return statistics.fmean(self.epochs) if self.epochs else None


class Report:
    """What is known of a study so far.

    Args:
        study: which.
        setting: it was run in.
        budget: epochs at gain 1.
        outcomes: of the runs that have ended.
        expected: how many runs there will be.
    """

    def __init__(
        self, study: Study, setting: Setup, budget: float, outcomes: Mapping[GridPoint, Outcome], expected: int
    ) -> None:
        self.study = study
        self.setting = setting
        self.budget = budget
        self.done, self.expected = len(outcomes), expected
        self.table: Table = read_table(setting.table)
        grouped: dict[tuple[str, int, int | None], list[Outcome]] = defaultdict(list)
        for cell, outcome in outcomes.items():
            grouped[cell.place].append(outcome)
        self.rows = [self._row(*key, group) for key, group in grouped.items()]
        baseline = [row.accuracy for row in self.rows if row.method == BASELINE.name]
        target = baseline[0] if baseline else self.table.target_percent if setting.is_published else None
        self.scale = None if target is None else Scale(target, setting.chance_percent)
        self.published_scale = Scale(self.table.target_percent, setting.chance_percent)

    def _row(self, method: str, workers: int, period: int | None, group: Sequence[Outcome]) -> Row:
        of_table = "local-ada" if method == "c=1" else method
        cell = None if period is None else self.table.cells.get((of_table, workers, period))
        return Row(
            method,
            workers,
            period,
            [outcome.accuracy_percent for outcome in group],
            [outcome.epochs for outcome in group if outcome.epochs is not None],
            sum(outcome.diverged for outcome in group),
            sum(outcome.seconds or 0.0 for outcome in group),
            None if cell is None else (cell.accuracy_percent, cell.epochs),
        )

    def verdict(self, row: Row) -> Verdict:
        """Of one line of the table."""
        if self.scale is None:
            return Verdict(None, "no baseline yet")
        if row.method == BASELINE.name:
            return Verdict(None, "the target")
        published = None if row.published is None else row.published[0]
        return judge(row.accuracy, self.scale, published, self.published_scale, same_setting=self.setting.is_published)

    @property
    def workers(self) -> list[int]:
        """The values of K that have results, less the baseline's."""
        return sorted({row.workers for row in self.rows if row.period is not None})

    def periods(self, workers: int) -> list[int]:
        """The values of H that have results at this K."""
        return sorted({row.period for row in self.rows if row.workers == workers and row.period is not None})

    def results(self, workers: int) -> Results:
        """What was measured at this K."""
        return {
            (row.method, row.period): Point(
                row.accuracy, None if row.mean_epochs is None else row.mean_epochs / self.budget
            )
            for row in self.rows
            if row.workers == workers and row.period is not None
        }

    def published(self, workers: int) -> Results:
        """What was published for this K."""
        return {
            (method, period): Point(cell.accuracy_percent, cell.epochs / self.setting.published_epochs)
            for (method, k, period), cell in self.table.cells.items()
            if k == workers
        }

    def claims(self) -> list[dict[str, Any]]:
        """The paper's claims, here and, where the table has what they need, in the published numbers."""
        found = []
        for workers in self.workers:
            periods = self.periods(workers)
            for claim in CLAIMS[self.study.name]:
                here = None if self.scale is None else check(claim, self.results(workers), periods, self.scale)
                published = check(claim, self.published(workers), periods, self.published_scale)
                found.append({"workers": workers, "claim": claim.text, "here": here, "published": published})
        return found

    @staticmethod
    def answer(claim: Mapping[str, Any]) -> str:
        """Whether a claim holds here, in words."""
        return {True: "yes", False: "no", None: "not known"}[claim["here"]]

    # -- as text -----------------------------------------------------------------------------------------------------

    def line(self, cell: GridPoint) -> str:
        """The row of a run in a few words."""
        row = next(row for row in self.rows if (row.method, row.workers, row.period) == cell.place)
        spread = "" if row.spread is None else f" ± {row.spread:.2f}"
        epochs = "diverged" if row.mean_epochs is None else f"{row.mean_epochs:.1f} epochs"
        return f"{row.accuracy:.2f}{spread} %, {epochs}: {self.verdict(row).text.replace('**', '')}"

    def markdown(self) -> str:
        """The whole report."""
        target = "not known yet: the baseline has not run"
        if self.scale is not None:
            source = "one worker here" if any(row.method == BASELINE.name for row in self.rows) else "published"
            target = f"{self.scale.target_percent:.2f} % ({source})"
        what = "Top-1" if self.setting.measure == "accuracy" else "Top-5"
        lines = [
            f"# {self.study.title}",
            "",
            f"{self.setting.title}; {self.budget:g} scale-invariant epochs (published runs: {self.setting.published_epochs}). "
            f"{what} accuracy on the test images in percent. Target {target}; published {self.table.target_percent:g} %. "
            f"{self.done} of {self.expected} runs are done.",
            "",
            "Published accuracies and epochs: Balles, Teja S and Archambeau, TMLR 2024, "
            f"Table {self.table.number}. {RULE}",
        ]
        for workers in self.workers or [1]:
            lines += ["", f"## K = {workers}", "", *self._claim_lines(workers), *self._table_lines(workers)]
        return "\n".join(lines) + "\n"

    def _claim_lines(self, workers: int) -> list[str]:
        words = {True: "yes", False: "**no**", None: "–"}
        lines = [
            f"| {claim['claim']} | {words[claim['published']]} | {words[claim['here']]} |"
            for claim in self.claims()
            if claim["workers"] == workers
        ]
        return ["| claim | published | here |", "|---|---|---|", *lines, ""] if lines else []

    def _table_lines(self, workers: int) -> list[str]:
        lines = [
            "| H | method | accuracy | published | epochs | × budget | published × budget | verdict |",
            "|---|---|---|---|---|---|---|---|",
        ]
        rows = [row for row in self.rows if row.workers == workers or row.method == BASELINE.name]
        for row in sorted(rows, key=lambda row: row.period or 0):
            spread = "" if row.spread is None else f" ± {row.spread:.2f}"
            diverged = f" ({row.diverged} diverged)" if row.diverged else ""
            accuracy, epochs = ("", "") if row.published is None else row.published
            if row.mean_epochs is None:
                used, share = "", ""
            else:
                used, share = f"{row.mean_epochs:.1f}", f"{row.mean_epochs / self.budget:.2f}"
            published_share = f"{epochs / self.setting.published_epochs:.2f}" if isinstance(epochs, int) else ""
            lines.append(
                f"| {row.period or ''} | {row.method} | {row.accuracy:.2f}{spread}{diverged} | {accuracy} | {used} | {share} | "
                f"{published_share} | {self.verdict(row).text} |"
            )
        return lines

    def record(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "study": self.study.name,
            "title": self.study.title,
            "setting": asdict(self.setting),
            "budget_epochs": self.budget,
            "target_percent": None if self.scale is None else self.scale.target_percent,
            "published_target_percent": self.table.target_percent,
            "rule": RULE,
            "runs_done": self.done,
            "runs_expected": self.expected,
            "rows": [
                asdict(row)
                | {"accuracy": row.accuracy, "spread": row.spread, "mean_epochs": row.mean_epochs}
                | asdict(self.verdict(row))
                for row in self.rows
            ],
            "claims": self.claims(),
        }

    def write(self, stem: Path) -> list[Path]:
        """Writes `stem`.md, .json and, with Matplotlib, .svg; returns their names."""
        paths = [stem.with_suffix(".md"), stem.with_suffix(".json")]
        write_text(paths[0], self.markdown())
        write_text(paths[1], json.dumps(self.record(), indent=1, ensure_ascii=False) + "\n")
        if self.workers:
            try:
                from hvdlocal.papers.figure import draw
            except ImportError:
                return paths
            paths.append(stem.with_suffix(".svg"))
            draw(self, paths[-1])
        return paths
