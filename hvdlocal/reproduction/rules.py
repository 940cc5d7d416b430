"""Rules for H side by side: what they reach, what they cost, and how flat the minimum is that they end in."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvdlocal.reproduction.curvature import Curvature
from hvdlocal.reproduction.runs import Outcome
from hvdlocal.reproduction.studies import Cell, Setting, Study
from hvdlocal.training.run_directory import write_whole

TITLES = {
    "sync": "data parallel (H = 1)",
    "constant": "H = 4",
    "inverse": "H ∝ 1/η",
    "qsr": "H ∝ 1/η² (QSR)",
    "cubic": "H ∝ 1/η³",
    "post-local": "post-local",
}


@dataclass(frozen=True)
class RuleRow:
    """A rule over all seeds that are done; lists have one entry a seed.

    Attributes:
        accuracies: in percent.
        communication: bytes sent, as a share of data parallelism's.
        losses: of the final average on training images as they are.
        largest, traces: of its Hessian.
    """

    method: str
    seeds: list[int]
    accuracies: list[float]
    communication: list[float]
    losses: list[float]
    largest: list[float]
    traces: list[float]


@dataclass(frozen=True)
class RuleClaim:
    """Something that the QSR paper says: `measure` of one rule is `sign` (1: more, -1: less) than that of another."""

    text: str
    rule: str
    other: str
    measure: Callable[[RuleRow], list[float]]
    sign: int


def _accuracies(row: RuleRow) -> list[float]:
    return row.accuracies


def _largest(row: RuleRow) -> list[float]:
    return row.largest


CLAIMS = (
    RuleClaim("QSR generalises better than data parallelism", "qsr", "sync", _accuracies, 1),
    RuleClaim("QSR generalises better than its smallest H throughout", "qsr", "constant", _accuracies, 1),
    RuleClaim("QSR generalises better than H ∝ 1/η", "qsr", "inverse", _accuracies, 1),
    RuleClaim("QSR generalises better than H ∝ 1/η³", "qsr", "cubic", _accuracies, 1),
    RuleClaim("QSR generalises better than post-local", "qsr", "post-local", _accuracies, 1),
    RuleClaim("QSR ends in a flatter minimum than data parallelism", "qsr", "sync", _largest, -1),
)

ERRORS = 2.0
"""Standard errors from which on a difference of means counts."""

SMALLEST_ERROR = 1e-9
"""So that equal differences have a finite number."""

RULE = (
    f"A difference between two rules counts if its mean over the seeds is more than {ERRORS:g} standard errors from zero; "
    "both rules have the same seeds, so it is taken seed by seed. Otherwise the seeds do not resolve it."
)


def resolved(differences: Sequence[float]) -> float | None:
    """The mean difference in standard errors; None for fewer than two seeds."""
    if len(differences) < 2:
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) / max(error, SMALLEST_ERROR)


class RuleReport:
    """What is known of a study of rules so far.

    Args:
        study: which.
        setting: it was run in.
        epochs: of every run.
        outcomes: of the runs that have ended.
        curvatures: of those that were measured.
        expected: how many runs there will be.
    """

    def __init__(
        self,
        study: Study,
        setting: Setting,
        epochs: float,
        outcomes: Mapping[Cell, Outcome],
        curvatures: Mapping[Cell, Curvature],
        expected: int,
    ) -> None:
        self.study, self.setting, self.epochs = study, setting, epochs
        self.done, self.expected = len(outcomes), expected
        self.workers = sorted({cell.workers for cell in outcomes})
        names = list(dict.fromkeys(cell.method.name for cell in outcomes))
        self.rows = [self._row(name, outcomes, curvatures) for name in names]

    @staticmethod
    def _row(name: str, outcomes: Mapping[Cell, Outcome], curvatures: Mapping[Cell, Curvature]) -> RuleRow:
        cells = sorted((cell for cell in outcomes if cell.method.name == name), key=lambda cell: cell.seed)
        mine = [outcomes[cell] for cell in cells]
        around = [curvatures[cell] for cell in cells if cell in curvatures]
        return RuleRow(
            name,
            [cell.seed for cell in cells],
            [outcome.accuracy_percent for outcome in mine],
            [outcome.communication for outcome in mine if outcome.communication is not None],
            [one.loss for one in around],
            [one.largest for one in around],
            [one.trace for one in around],
        )

    def claims(self) -> list[dict[str, Any]]:
        """The paper's claims, with the mean difference and how many standard errors it is from zero."""
        rows = {row.method: row for row in self.rows}
        found: list[dict[str, Any]] = []
        if not rows:
            return found
        for claim in CLAIMS:
            mine, other = rows.get(claim.rule), rows.get(claim.other)
            differences = []
            if mine is not None and other is not None and mine.seeds == other.seeds:
                pairs = list(zip(claim.measure(mine), claim.measure(other), strict=False))
                differences = [a - b for a, b in pairs] if len(pairs) == len(mine.seeds) else []
            errors = resolved(differences)
            here = None if errors is None or abs(errors) <= ERRORS else errors * claim.sign > 0
            found.append(
                {
                    "workers": self.workers[0],
                    "claim": claim.text,
                    "here": here,
                    "difference": statistics.fmean(differences) if differences else None,
                    "standard_errors": errors,
                }
            )
        return found

    def line(self, cell: Cell) -> str:
        """The row of a run in a few words."""
        row = next(row for row in self.rows if row.method == cell.method.name)
        largest = f", largest eigenvalue {_mean(row.largest)}" if row.largest else ""
        return f"{_mean(row.accuracies, '.2f')} %, {_mean(row.communication, '.1%')} of the communication{largest}"

    def markdown(self) -> str:
        """The whole report."""
        lines = [
            f"# {self.study.title}",
            "",
            f"{self.setting.title}; K = {self.workers[0]}, {self.epochs:g} epochs for every rule. {self.done} of "
            f"{self.expected} runs are done; ± is the standard deviation over the seeds. Communication: bytes, as a share of "
            "data parallelism's. Training loss, largest eigenvalue and trace of its Hessian: of the final average, on the first "
            "training images without augmentation.",
            "",
            "| rule | test accuracy | communication | training loss | largest eigenvalue | trace |",
            "|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            cells = [
                TITLES.get(row.method, row.method),
                _mean(row.accuracies, ".2f"),
                f"{statistics.fmean(row.communication):.1%}" if row.communication else "",
                _mean(row.losses, ".3f"),
                _mean(row.largest),
                _mean(row.traces),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", f"What Gu, Lyu, Arora, Zhang and Huang (ICLR 2024) say of large networks on ImageNet. {RULE}", ""]
        lines += ["| claim | here | difference | standard errors |", "|---|---|---|---|"]
        words = {True: "yes", False: "**no**", None: "not resolved"}
        for claim in self.claims():
            difference, errors = claim["difference"], claim["standard_errors"]
            numbers = "" if difference is None else f"{difference:+.2f}", "" if errors is None else f"{errors:+.1f}"
            lines.append(f"| {claim['claim']} | {words[claim['here']]} | {' | '.join(numbers)} |")
        return "\n".join(lines) + "\n"

    def record(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "study": self.study.name,
            "title": self.study.title,
            "setting": asdict(self.setting),
            "epochs": self.epochs,
            "rule": RULE,
            "runs_done": self.done,
            "runs_expected": self.expected,
            "rows": [asdict(row) for row in self.rows],
            "claims": self.claims(),
        }

    def write(self, stem: Path) -> list[Path]:
        """Writes `stem`.md, .json and, with Matplotlib, .svg; returns their names."""
        paths = [stem.with_suffix(".json")]
        write_whole(paths[0], json.dumps(self.record(), indent=1, ensure_ascii=False) + "\n")
        if not self.rows:
            return paths
        paths.append(stem.with_suffix(".md"))
        write_whole(paths[-1], self.markdown())
        try:
            from hvdlocal.reproduction.figure import draw_rules
        except ImportError:
            return paths
        paths.append(stem.with_suffix(".svg"))
        draw_rules(self, paths[-1])
        return paths


def _mean(values: Sequence[float], form: str = ".3g") -> str:
    """The mean, with the standard deviation over several seeds."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"
