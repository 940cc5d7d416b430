"""Compares measured with published results: a rule for the outcome of a run, and the paper's claims about a grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

TOLERANCE_PERCENT = 1.5
"""Differences in accuracy up to this many points do not count: three standard deviations on 10,000 test images are 1.4."""

TOLERANCE_EPOCHS = 0.1
"""Relative differences in epochs up to this do not count."""

RULE = (
    f"A method holds the target if it reaches it less {TOLERANCE_PERCENT} points, collapses below the middle between the "
    "target and chance, and degrades in between. A diverged run counts as chance. An outcome agrees if the published one, by "
    "the same rule and the published target, is the same; in the paper's own setting, if the accuracies differ by at most "
    f"{TOLERANCE_PERCENT} points or both collapse."
)

Grade = Literal["holds", "degrades", "collapses"]


@dataclass(frozen=True)
class Point:
    """The result of a method at one K and H. `epochs` are in units of the budget; None if they are not known."""

    accuracy_percent: float
    epochs: float | None


@dataclass(frozen=True)
class Scale:
    """The reference accuracies: that of one worker, and that of chance."""

    target_percent: float
    chance_percent: float

    def grade(self, accuracy_percent: float) -> Grade:
        """Grades an accuracy relative to the target."""
        if accuracy_percent >= self.target_percent - TOLERANCE_PERCENT:
            return "holds"
        if accuracy_percent < (self.target_percent + self.chance_percent) / 2:
            return "collapses"
        return "degrades"


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison; `agrees` is None if nothing was published."""

    agrees: bool | None
    text: str


def judge(here: float, scale: Scale, published: float | None, published_scale: Scale, *, same_setting: bool) -> Verdict:
    """Compares an accuracy with the published one, both in percent."""
    grade = scale.grade(here)
    if published is None:
        return Verdict(None, grade)
    published_grade = published_scale.grade(published)
    if same_setting and not grade == published_grade == "collapses":
        agrees = abs(here - published) <= TOLERANCE_PERCENT
        return Verdict(agrees, f"{grade}, {here - published:+.2f} points" + ("" if agrees else " **differs**"))
    if grade == published_grade:
        return Verdict(True, f"{grade}, as published")
    return Verdict(False, f"{grade}, published: {published_grade} **differs**")


Results = Mapping[tuple[str, int], Point]
"""Results by method and H, at one K."""


@dataclass(frozen=True)
class Claim:
    """A statement of the paper about a grid.

    Attributes:
        text: the statement, as a sentence.
        holds: tells whether it holds in some results, for one K and ascending H; raises KeyError if a run is missing.
    """

    text: str
    holds: Callable[[Results, Sequence[int], Scale], bool]


def _ends(periods: Sequence[int]) -> tuple[int, int]:
    """Returns the smallest and the largest H; raises KeyError if there is only one."""
    if len(periods) < 2:
        raise KeyError("a second H")
    return periods[0], periods[-1]


def _loses(results: Results, method: str, periods: Sequence[int]) -> bool:
    few, many = (results[method, period].accuracy_percent for period in _ends(periods))
    return many < few


def _acc_lin_collapses(results: Results, periods: Sequence[int], scale: Scale) -> bool:
    last = results["acc-lin", periods[-1]].accuracy_percent
    return _loses(results, "acc-lin", periods) and scale.grade(last) == "collapses"


def _local_lin_degrades(results: Results, periods: Sequence[int], _: Scale) -> bool:
    local, accumulated = (results[method, periods[-1]].accuracy_percent for method in ("local-lin", "acc-lin"))
    return _loses(results, "local-lin", periods) and local > accumulated


def _adaptive_hold(results: Results, periods: Sequence[int], scale: Scale) -> bool:
    return all(
        scale.grade(results[method, period].accuracy_percent) == "holds"
        for method in ("acc-ada", "local-ada")
        for period in periods
    )


def _epochs(results: Results, method: str, period: int) -> float:
    epochs = results[method, period].epochs
    if epochs is None:
        raise KeyError(method, period)
    return epochs


def _epochs_cross(results: Results, periods: Sequence[int], _: Scale) -> bool:
    few, many = (
        _epochs(results, "local-ada", period) - _epochs(results, "acc-ada", period) for period in _ends(periods)
    )
    return few > 0 > many


def _same_as(other: str) -> tuple[Claim, Claim]:
    """Returns the claims about local-ada and a variant of it."""

    def accuracy(results: Results, periods: Sequence[int], _: Scale) -> bool:
        return all(
            abs(results["local-ada", period].accuracy_percent - results[other, period].accuracy_percent)
            <= TOLERANCE_PERCENT
            for period in periods
        )

    def epochs(results: Results, periods: Sequence[int], _: Scale) -> bool:
        return all(
            abs(_epochs(results, "local-ada", period) / _epochs(results, other, period) - 1) <= TOLERANCE_EPOCHS
            for period in periods
        )

    return (
        Claim(f"both reach the same accuracy, to {TOLERANCE_PERCENT} points", accuracy),
        Claim(f"both take the same number of epochs, to {TOLERANCE_EPOCHS:.0%}", epochs),
    )


_WEIGHTS = ("c=0", "c=0.2", "c=0.4", "c=0.6", "c=0.8", "c=1")


def _less_bias_is_faster(results: Results, periods: Sequence[int], _: Scale) -> bool:
    return all(
        _epochs(results, "c=0", period) == min(_epochs(results, name, period) for name in _WEIGHTS)
        for period in periods
    )


def _adascale_generalises_worse(results: Results, periods: Sequence[int], _: Scale) -> bool:
    period = periods[-1]
    return results["c=0", period].accuracy_percent < results["c=1", period].accuracy_percent


def _large_weights_hold(results: Results, periods: Sequence[int], scale: Scale) -> bool:
    return all(
        scale.grade(results[name, period].accuracy_percent) == "holds"
        for name in ("c=0.6", "c=0.8", "c=1")
        for period in periods
    )


_TABLE_CLAIMS = (
    Claim("acc-lin loses accuracy as H grows, and collapses at the largest", _acc_lin_collapses),
    Claim("local-lin loses accuracy as H grows, less than acc-lin", _local_lin_degrades),
    Claim("acc-ada and local-ada hold the accuracy of one worker at every H", _adaptive_hold),
    Claim("local-ada takes more epochs than acc-ada at the smallest H, fewer at the largest", _epochs_cross),
)

CLAIMS: dict[str, tuple[Claim, ...]] = {
    "table2": _TABLE_CLAIMS,
    "table3": _TABLE_CLAIMS,
    "table4": _TABLE_CLAIMS,
    "fig9": _same_as("local-ada-nostale"),
    "fig10": (
        Claim("c = 0, AdaScale's gain, takes the fewest epochs", _less_bias_is_faster),
        Claim("at the largest H it reaches less accuracy than c = 1", _adascale_generalises_worse),
        Claim("c ≥ 0.6 holds the accuracy of one worker", _large_weights_hold),
    ),
    "sketch": _same_as("exact"),  # not a claim of the paper, which sends the gradient itself
}
"""The claims by study. No claim is about a particular K, so each one is checked for every K."""


def check(claim: Claim, results: Results, periods: Sequence[int], scale: Scale) -> bool | None:
    """Returns whether a claim holds; None if runs that it needs are missing, or if there is a single H."""
    try:
        return claim.holds(results, periods, scale)
    except KeyError:
        return None
