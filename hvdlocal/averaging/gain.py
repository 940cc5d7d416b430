"""The factor put on the base learning rate. Arithmetic on numbers, to be read beside the papers.

Symbols (Balles, Teja S, Archambeau, TMLR 2024, "On the Choice of Learning Rate for Local SGD"):
K `num_workers`, H `period`, a `accumulate` (micro-batches per optimizer step), G `grad_sqr` = ‖∇f‖², σ² `grad_var` = the
variance of one worker's gradient of one micro-batch, ρ `gain`, s `progress` (scale-invariant iterations), S `budget`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Literal


def gain_ratio(
    grad_sqr: float, grad_var: float, num_workers: int, period: int, c: float = 1.0, *, accumulate: int = 1
) -> float:
    """The gain ratio ρ of LocalAdaScale: how much larger than the base learning rate a step may be (Eqs. 14 and 49).

    ρ(c) = 2 (G + σ²) / ( G + σ²/(Ka) + sqrt( (G + σ²/(Ka))² + 3 c (H−1) G σ²/a ) )

    With a = 1 it is the paper's. With accumulation, the local gradient is the mean of a micro-batches, whose variance is
    σ²/a, while the base learning rate stays that of one micro-batch. H = 1 or c = 0 gives AdaScale (Eq. 21).
    For H > 1 the gain may be below 1.

    Args:
        grad_sqr: G ≥ 0.
        grad_var: σ² ≥ 0, not both zero.
        num_workers: K ≥ 1.
        period: H ≥ 1, local steps per averaging.
        c: weight of the local steps' bias; 1 is LocalAdaScale, 0 AdaScale (the paper's App. F).
        accumulate: a ≥ 1, micro-batches per optimizer step.

    Returns:
        A factor in (0, K·a].

    Raises:
        ValueError: an argument is out of its range.
    """
    if grad_sqr < 0 or grad_var < 0 or not grad_sqr + grad_var > 0:
        raise ValueError(f"grad_sqr={grad_sqr} and grad_var={grad_var} must be ≥ 0 and not both 0")
    if num_workers < 1 or period < 1 or accumulate < 1:
        raise ValueError(
            f"num_workers={num_workers}, period={period} and accumulate={accumulate} must all be at least 1"
        )
    if c < 0:
        raise ValueError(f"c={c} must be ≥ 0")
    local_var = grad_var / accumulate
    averaged = grad_sqr + local_var / num_workers
    root = math.sqrt(averaged**2 + 3 * c * (period - 1) * grad_sqr * local_var)
    return 2 * (grad_sqr + grad_var) / (averaged + root)


@dataclass(frozen=True)
class ScalingContext:
    """What a scaling rule may look at before a step.

    `grad_sqr` and `grad_var` are None before the first estimate; `budget` is None when the run has no planned end.
    """

    num_workers: int
    accumulate: int
    period: int
    progress: float
    budget: float | None
    grad_sqr: float | None = None
    grad_var: float | None = None


class Scaling:
    """A rule for the gain.

    Attributes:
        uses_statistics: whether the rule needs gradient statistics.
        progress_varies: whether `progress` may differ between two steps of one round.
    """

    uses_statistics = False
    progress_varies = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({vars(self)})"  # the same on every rank, unlike Python's own

    def gain(self, now: ScalingContext) -> float:
        """The factor on the base learning rate."""
        raise NotImplementedError

    def progress(self, now: ScalingContext) -> float:
        """The scale-invariant iterations that one step counts for: its gain."""
        return self.gain(now)

    def reference_batches(self, num_workers: int, accumulate: int) -> int:
        """Micro-batches of the step that the base learning rate was tuned for; a unit of progress consumes as many."""
        return 1


@dataclass(frozen=True)
class NoScaling(Scaling):
    """Gain 1: the learning rate is that of the whole step, K workers with a micro-batches each, as in Gu et al. (QSR)."""

    progress_varies = False

    def gain(self, now: ScalingContext) -> float:
        return 1.0

    def reference_batches(self, num_workers: int, accumulate: int) -> int:
        return num_workers * accumulate


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """Gain K·a after a linear warm-up from 1 (ACC-LIN and LOCAL-LIN; Goyal et al. 2018).

    A step counts for K·a iterations in the warm-up too, so that a run takes exactly the base number of epochs.

    Args:
        warmup: share of the budget over which the gain rises; the paper's 5 %. 0 needs no budget.
    """

    warmup: float = 0.05
    progress_varies = False

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"LinearScaling(warmup={self.warmup}): give a share of the budget, 0 ≤ warmup < 1")

    def gain(self, now: ScalingContext) -> float:
        full = now.num_workers * now.accumulate
        if self.warmup == 0:
            return float(full)
        if now.budget is None:
            raise ValueError(
                "LinearScaling warms up over a share of the budget: give the optimizer budget=… (scale-invariant "
                "iterations), or LinearScaling(warmup=0)"
            )
        return 1 + (full - 1) * min(1.0, now.progress / (self.warmup * now.budget))

    def progress(self, now: ScalingContext) -> float:
        return float(now.num_workers * now.accumulate)


@dataclass(frozen=True)
class AdaScale(Scaling):
    """The gain of data parallelism with accumulation, r = (G + σ²)/(G + σ²/(Ka)) (ACC-ADA; Johnson et al. 2020, Alg. 2).

    Args:
        smoothing: θ of the statistics' moving averages; by default FairScale's max(1 − M/1000, 0), where M is the number
            of micro-batches that all workers consume between two estimates.
    """

    smoothing: float | None = None
    uses_statistics = True
    progress_varies = False

    def __post_init__(self) -> None:
        _check_smoothing(self.smoothing)

    def gain(self, now: ScalingContext) -> float:
        if now.grad_sqr is None or now.grad_var is None:
            return 1.0
        return gain_ratio(now.grad_sqr, now.grad_var, now.num_workers, 1, accumulate=now.accumulate)


@dataclass(frozen=True)
class LocalAdaScale(Scaling):
    """The gain of Local SGD from gradient statistics (LOCAL-ADA; Alg. 1 and Eq. 14).

    The gradient of the first step after an averaging, which all workers take at the same weights, gives G and σ².

    Args:
        c: weight of the local steps' bias (App. F): 1 is LocalAdaScale, 0 AdaScale's gain on local steps.
        stale: True sends the statistics with the next averaging: one collective a round, and a gain that is one round old
            (Alg. 1). False sends them at once: two collectives a round (Alg. 4, LOCAL-ADA-NOSTALE).
        statistics: "sketch" sends a random projection of the gradient (docs/decisions.md), "exact" the gradient itself, which
            doubles the payload.
        sketch_size: length of the projection; the relative error of an estimate is about sqrt(2/sketch_size). By default a
            64th of the parameters, at least 1,024 (4 %) and at most 16,384 (1 %).
        smoothing: as in `AdaScale`.
    """

    c: float = 1.0
    stale: bool = True
    statistics: Literal["sketch", "exact"] = "sketch"
    sketch_size: int | None = None
    smoothing: float | None = None
    uses_statistics = True
    progress_varies = False

    def __post_init__(self) -> None:
        if not 0 <= self.c < math.inf:
            raise ValueError(f"LocalAdaScale(c={self.c}): c must be ≥ 0")
        if self.statistics not in ("sketch", "exact"):
            raise ValueError(f"LocalAdaScale(statistics={self.statistics!r}): choose 'sketch' or 'exact'")
        if self.sketch_size is not None and not (isinstance(self.sketch_size, Integral) and self.sketch_size >= 16):
            raise ValueError(f"LocalAdaScale(sketch_size={self.sketch_size!r}): must be a whole number of at least 16")
        _check_smoothing(self.smoothing)

    def gain(self, now: ScalingContext) -> float:
        if now.grad_sqr is None or now.grad_var is None:
            return 1.0
        return gain_ratio(now.grad_sqr, now.grad_var, now.num_workers, now.period, self.c, accumulate=now.accumulate)


def _check_smoothing(theta: float | None) -> None:
    if theta is not None and not 0 <= theta < 1:
        raise ValueError(f"smoothing={theta}: give 0 ≤ smoothing < 1, or leave it to the default")
