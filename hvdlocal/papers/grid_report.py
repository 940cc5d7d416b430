"""The report of a study: its results beside the published ones, as Markdown, JSON and a figure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdlocal.papers.claims import CLAIMS, RULE, Point, Results, Scale, Verdict, check, judge
from hvdlocal.papers.published import Table, read_table
from hvdlocal.papers.report_files import write_report
from hvdlocal.papers.runs import Outcome
from hvdlocal.papers.studies import BASELINE, GridPoint, Setup, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hvdlocal.figures.style import Figure


@dataclass(frozen=True)
class Row:
    """A method at one K and H, over all finished seeds.

    Attributes:
        method: name of the method.
        workers: K.
        period: H; None for the baseline.
        accuracies: accuracies in percent, one per seed; the accuracy of chance for a run that diverged.
        epochs: passes over the data of the runs that did not diverge.
        diverged: number of runs that diverged.
        seconds: duration of all runs together, each from its first step to its last.
        published: published accuracy in percent and epochs; None if there are none.
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
        """Mean accuracy over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the accuracy over the seeds; None for one seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def mean_epochs(self) -> float | None:
        """Mean epochs over the seeds that did not diverge; None if all diverged."""
        return statistics.fmean(self.epochs) if self.epochs else None


class GridReport:
    """The results of a study so far.

    Args:
        study: the study.
        setting: the setting in which it was run.
        budget: epochs at gain 1.
        outcomes: the outcomes of the finished runs.
        expected: number of runs of the whole study.
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
        for point, outcome in outcomes.items():
            grouped[point.place].append(outcome)
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
        """Compares a line of the table with the published result."""
        if self.scale is None:
            return Verdict(None, "no baseline yet")
        if row.method == BASELINE.name:
            return Verdict(None, "the target")
        published = None if row.published is None else row.published[0]
        return judge(row.accuracy, self.scale, published, self.published_scale, same_setting=self.setting.is_published)

    @property
    def workers(self) -> list[int]:
        """The values of K that have results, without the baseline's."""
        return sorted({row.workers for row in self.rows if row.period is not None})

    def periods(self, workers: int) -> list[int]:
        """Returns the values of H that have results at this K."""
        return sorted({row.period for row in self.rows if row.workers == workers and row.period is not None})

    def results(self, workers: int) -> Results:
        """Returns the measured results at this K."""
        return {
            (row.method, row.period): Point(
                row.accuracy, None if row.mean_epochs is None else row.mean_epochs / self.budget
            )
            for row in self.rows
            if row.workers == workers and row.period is not None
        }

    def published(self, workers: int) -> Results:
        """Returns the published results for this K."""
        return {
            (method, period): Point(cell.accuracy_percent, cell.epochs / self.setting.published_epochs)
            for (method, k, period), cell in self.table.cells.items()
            if k == workers
        }

    def claims(self) -> list[dict[str, Any]]:
        """Returns the paper's claims, checked against these results and, if possible, against the published numbers."""
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
        """Returns in words whether a claim holds here."""
        return {True: "yes", False: "no", None: "not known"}[claim["here"]]

    # -- as text -----------------------------------------------------------------------------------------------------

    def line(self, point: GridPoint) -> str:
        """Describes the row of a run in a few words."""
        row = next(row for row in self.rows if (row.method, row.workers, row.period) == point.place)
        spread = "" if row.spread is None else f" ± {row.spread:.2f}"
        epochs = "diverged" if row.mean_epochs is None else f"{row.mean_epochs:.1f} epochs"
        return f"{row.accuracy:.2f}{spread} %, {epochs}: {self.verdict(row).text.replace('**', '')}"

    def markdown(self) -> str:
        """Returns the report as text."""
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
        """Returns the report for programs."""
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
        return write_report(stem, self.markdown(), self.record(), partial(_draw, self) if self.workers else None)


_COLORS = {"acc-ada": 0, "local-ada": 1, "acc-lin": 2, "local-lin": 4, "local-ada-nostale": 3, "exact": 3}
"""Colour of each method, as an index into the style's colours."""


def _draw(report: GridReport) -> Figure:
    """Draws a row of panels for each K: accuracies relative to the target, and epochs in units of the budget."""
    from hvdlocal.figures.style import new_figure, style

    with style():
        figure, axes = new_figure(len(report.workers), 2, width=9.5, height=3.2)
        for row, workers in zip(axes, report.workers, strict=True):
            lines = _over_weights if report.study.name == "fig10" else _over_periods
            lines(report, workers, row)
            row[0].axhline(0, color="#808080", lw=0.8)
            row[0].set(title=f"K = {workers}", ylabel="Accuracy less the target\n[points]")
            row[1].set(ylabel="Epochs / budget")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
    return figure


def _over_periods(report: GridReport, workers: int, panels: Sequence[Axes]) -> None:
    from hvdlocal.figures.style import COLORS, fit_scale, powers_axis

    periods = report.periods(workers)
    sources: list[tuple[str, Results, float, Any]] = [
        ("", report.results(workers), report.scale.target_percent if report.scale else 0.0, "solid")
    ]
    published = {key: point for key, point in report.published(workers).items() if key[1] in periods}
    sources.append((", published", published, report.published_scale.target_percent, (0, (1, 1.5))))
    for method, index in _COLORS.items():
        color = COLORS[index]
        for suffix, results, target, dashes in sources:
            mine = sorted(period for name, period in results if name == method)
            if not mine or (suffix and (method, mine[0]) not in report.results(workers)):
                continue
            heights = [results[method, period].accuracy_percent - target for period in mine]
            label = f"{method}{suffix}"
            marker = "" if suffix else "o"
            panels[0].plot(mine, heights, color=color, ls=dashes, marker=marker, label=label)
            known = [(period, epochs) for period in mine if (epochs := results[method, period].epochs) is not None]
            panels[1].plot(
                [p for p, _ in known], [e for _, e in known], color=color, ls=dashes, marker=marker, label=label
            )
    for panel in panels:
        powers_axis(panel, "x", periods)
        panel.set_xlabel("H: local steps, or accumulated batches")
    fit_scale(panels[1], "y", _all_epochs(report, workers), ratio=4)


def _over_weights(report: GridReport, workers: int, panels: Sequence[Axes]) -> None:
    from hvdlocal.figures.style import COLORS

    results = report.results(workers)
    target = report.scale.target_percent if report.scale else 0.0
    for period, color in zip(report.periods(workers), COLORS, strict=False):
        mine = sorted((float(name.removeprefix("c=")), point) for (name, h), point in results.items() if h == period)
        weights = [c for c, _ in mine]
        panels[0].plot(
            weights, [p.accuracy_percent - target for _, p in mine], "o-", color=color, label=f"H = {period}"
        )
        panels[1].plot(weights, [p.epochs or float("nan") for _, p in mine], "o-", color=color)
    for panel in panels:
        panel.set_xlabel("c: weight of the local steps' bias")


def _all_epochs(report: GridReport, workers: int) -> list[float]:
    results: Results = report.results(workers)
    return [point.epochs for point in results.values() if point.epochs is not None]
