"""The report on rules for H: their accuracy, their communication, and the sharpness of the minima that they find."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdlocal.papers.report_files import write_report
from hvdlocal.papers.run_sharpness import IMAGES, RunSharpness
from hvdlocal.papers.runs import Outcome
from hvdlocal.papers.studies import GridPoint, Setup, Study

if TYPE_CHECKING:
    from hvdlocal.figures.style import Figure

TITLES = {
    "sync": "data parallel (H = 1)",
    "constant": "H = 4",
    "inverse": "H ∝ 1/η",
    "qsr": "H ∝ 1/η² (QSR)",
    "cubic": "H ∝ 1/η³",
    "post-local": "post-local",
}


@dataclass(frozen=True)
class RuleRun:
    """One seed of a rule; `sharpness` is None until it is measured, and for a run that diverged."""

    seed: int
    outcome: Outcome
    sharpness: RunSharpness | None

    @property
    def accuracy(self) -> float:
        """Accuracy in percent; the accuracy of chance if the run diverged."""
        return self.outcome.accuracy_percent

    @property
    def communication(self) -> float | None:
        """Bytes sent, relative to data parallelism; None if the run diverged."""
        return self.outcome.communication

    @property
    def loss(self) -> float | None:
        """Loss of the final average on training images without augmentation; None if it was not measured."""
        return None if self.sharpness is None else self.sharpness.loss

    @property
    def largest(self) -> float | None:
        """Largest eigenvalue of that loss's Hessian."""
        return None if self.sharpness is None else self.sharpness.largest

    @property
    def trace(self) -> float | None:
        """Trace of that Hessian."""
        return None if self.sharpness is None else self.sharpness.trace

    def record(self) -> dict[str, Any]:
        """Returns the run as it is written to the JSON file."""
        sharpness = None if self.sharpness is None else asdict(self.sharpness)
        return {"seed": self.seed, "outcome": asdict(self.outcome), "curvature": sharpness}


Measure = Callable[[RuleRun], float | None]


@dataclass(frozen=True)
class RuleClaim:
    """A statement of the QSR paper: `measure` of one rule is more (`sign` 1) or less (-1) than that of another."""

    text: str
    rule: str
    other: str
    measure: Measure
    sign: int


def _accuracy(run: RuleRun) -> float:
    return run.accuracy


def _largest(run: RuleRun) -> float | None:
    return run.largest


CLAIMS = (
    RuleClaim("QSR generalises better than data parallelism", "qsr", "sync", _accuracy, 1),
    RuleClaim("QSR generalises better than its smallest H throughout", "qsr", "constant", _accuracy, 1),
    RuleClaim("QSR generalises better than H ∝ 1/η", "qsr", "inverse", _accuracy, 1),
    RuleClaim("QSR generalises better than H ∝ 1/η³", "qsr", "cubic", _accuracy, 1),
    RuleClaim("QSR generalises better than post-local", "qsr", "post-local", _accuracy, 1),
    RuleClaim("QSR ends in a flatter minimum than data parallelism", "qsr", "sync", _largest, -1),
)

CONFIDENCE = 0.95

RULE = (
    f"A difference between two rules is taken seed by seed and counts if Student's t, two-sided with {CONFIDENCE:.0%}, resolves "
    f"it; there are {len(CLAIMS)} claims, so about one in {round(1 / (1 - CONFIDENCE) / len(CLAIMS))} such tables has a yes or "
    "no by chance alone."
)


def resolved(differences: Sequence[float]) -> int | None:
    """Returns the sign of the mean difference if it is significant, 0 if it is not, None for fewer than two seeds.

    Raises:
        ImportError: SciPy is missing.
    """
    from scipy.stats import t

    if len(differences) < 2:
        return None
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    needed = t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)
    return int(math.copysign(1, mean)) if error and abs(mean) > needed * error else 0


class RuleReport:
    """The results of a study of rules, for one K, so far.

    Args:
        study: the study.
        setting: the setting in which it was run.
        epochs: the epochs of every run.
        outcomes: the outcomes of the finished runs.
        sharpnesses: the sharpness of those runs for which it was measured.
        expected: number of runs of the whole study.
    """

    def __init__(
        self,
        study: Study,
        setting: Setup,
        epochs: float,
        outcomes: Mapping[GridPoint, Outcome],
        sharpnesses: Mapping[GridPoint, RunSharpness],
        expected: int,
    ) -> None:
        self.study, self.setting, self.epochs = study, setting, epochs
        self.done, self.expected = len(outcomes), expected
        self.workers = sorted({point.workers for point in outcomes})
        self.runs: dict[str, list[RuleRun]] = {}
        for point, outcome in sorted(outcomes.items(), key=lambda item: item[0].seed):
            self.runs.setdefault(point.method.name, []).append(RuleRun(point.seed, outcome, sharpnesses.get(point)))
        self.runs = {method.name: self.runs[method.name] for method in study.methods if method.name in self.runs}

    def claims(self) -> list[dict[str, Any]]:
        """Returns the paper's claims, each with the mean difference and its standard error."""
        return [self._claim(claim) for claim in CLAIMS] if self.runs else []

    def _claim(self, claim: RuleClaim) -> dict[str, Any]:
        other = {run.seed: claim.measure(run) for run in self.runs.get(claim.other, [])}
        pairs = [(claim.measure(run), other.get(run.seed)) for run in self.runs.get(claim.rule, [])]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        sign = resolved(differences)
        spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
        return {
            "workers": self.workers[0],
            "claim": claim.text,
            "here": None if not sign else sign == claim.sign,
            "seeds": len(differences),
            "difference": statistics.fmean(differences) if differences else None,
            "standard_error": spread / math.sqrt(len(differences)) if spread else None,
        }

    @staticmethod
    def answer(claim: Mapping[str, Any]) -> str:
        """Returns in words whether a claim holds here."""
        if claim["here"] is None:
            return "not resolved" if claim["seeds"] > 1 else "not known"
        return "yes" if claim["here"] else "no"

    def line(self, point: GridPoint) -> str:
        """Describes the row of a run in a few words."""
        runs = self.runs[point.method.name]
        accuracy, communication = _mean(runs, _accuracy, ".2f"), _mean(runs, lambda run: run.communication, ".1%")
        return f"{accuracy} %, {communication} of the communication" if communication else f"{accuracy} %: diverged"

    def markdown(self) -> str:
        """Returns the report as text."""
        lines = [
            f"# {self.study.title}",
            "",
            f"{self.setting.title}; K = {self.workers[0]}, {self.epochs:g} epochs for every rule. {self.done} of "
            f"{self.expected} runs are done; ± is the standard deviation over the seeds. Communication: bytes, as a share of "
            "data parallelism's. Training loss, largest eigenvalue and trace of its Hessian: of the final average, on the first "
            f"{IMAGES:,} training images (or all, if there are fewer) without augmentation. A run that diverged counts as "
            "chance.",
            "",
            "| rule | test accuracy | communication | training loss | largest eigenvalue | trace |",
            "|---|---|---|---|---|---|",
        ]
        for name, runs in self.runs.items():
            diverged = sum(run.outcome.diverged for run in runs)
            cells = [
                TITLES.get(name, name),
                _mean(runs, _accuracy, ".2f") + (f" ({diverged} diverged)" if diverged else ""),
                _mean(runs, lambda run: run.communication, ".1%"),
                _mean(runs, lambda run: run.loss, ".3f"),
                _mean(runs, _largest, ".3g"),
                _mean(runs, lambda run: run.trace, ".3g"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", f"What Gu, Lyu, Arora, Zhang and Huang (ICLR 2024) say of large networks on ImageNet. {RULE}", ""]
        lines += ["| claim | here | difference | standard error | seeds |", "|---|---|---|---|---|"]
        for claim in self.claims():
            difference, error = claim["difference"], claim["standard_error"]
            cells = [
                claim["claim"],
                "**no**" if claim["here"] is False else self.answer(claim),
                "" if difference is None else f"{difference:+.2f}",
                "" if error is None else f"{error:.2f}",
                str(claim["seeds"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def record(self) -> dict[str, Any]:
        """Returns the report for programs."""
        return {
            "study": self.study.name,
            "title": self.study.title,
            "setting": asdict(self.setting),
            "epochs": self.epochs,
            "rule": RULE,
            "runs_done": self.done,
            "runs_expected": self.expected,
            "rows": [{"method": name, "runs": [run.record() for run in runs]} for name, runs in self.runs.items()],
            "claims": self.claims(),
        }

    def write(self, stem: Path) -> list[Path]:
        """Writes `stem`.json and, once there are runs, `stem`.md and, with Matplotlib, .svg; returns their names."""
        if not self.runs:
            return write_report(stem, None, self.record(), None)
        return write_report(stem, self.markdown(), self.record(), partial(_draw, self))


def _mean(runs: Sequence[RuleRun], measure: Measure, form: str) -> str:
    """Formats the mean and, for several seeds, the standard deviation; returns "" if nothing is known."""
    values = [value for run in runs if (value := measure(run)) is not None]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def _draw(report: RuleReport) -> Figure:
    """Draws accuracy and sharpness of every rule against its communication, with a point for each seed."""
    from hvdlocal.figures.style import COLORS, new_figure, style

    with style():
        figure, axes = new_figure(1, 2, width=9.5, height=3.4)
        for (name, runs), color in zip(report.runs.items(), COLORS, strict=False):
            known = [(100 * run.communication, run) for run in runs if run.communication is not None]
            for panel, points in zip(
                axes[0],
                (
                    [(share, run.accuracy) for share, run in known],
                    [(share, run.largest) for share, run in known if run.largest is not None],
                ),
                strict=True,
            ):
                if points:
                    shares, values = zip(*points, strict=True)
                    panel.plot(shares, values, ".", color=color, alpha=0.6)
                    mean = ([sum(shares) / len(shares)], [sum(values) / len(values)])
                    panel.plot(*mean, "o", color=color, ms=6, label=TITLES.get(name, name))
        for panel, label in zip(
            axes[0], ("Test accuracy [%]", "Largest eigenvalue of the Hessian\nof the training loss"), strict=True
        ):
            panel.set(xlabel="Bytes sent [% of data parallelism's]", ylabel=label)
            panel.set_xlim(0)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure
