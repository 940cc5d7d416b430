"""A run's steps and rounds without running it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hvdlocal.averaging.gain import NoScaling, Scaling, ScalingContext
from hvdlocal.averaging.period import PeriodRule, RoundStart


class Round(NamedTuple):
    """A round: where it starts, and what holds in it.

    Attributes:
        start: the step it starts at, from 0.
        period: H, its steps.
        lr: η, the learning rate that the rule for H saw.
        gain: ρ of its first step.
        progress: scale-invariant iterations done when it starts.
        end: and when it ends.
    """

    start: int
    period: int
    lr: float
    gain: float
    progress: float
    end: float


def plan_rounds(
    rule: PeriodRule,
    schedule: Callable[[float], float],
    budget: float,
    scaling: Scaling | None = None,
    *,
    num_workers: int = 1,
    accumulate: int = 1,
    statistics: tuple[float, float] | None = None,
    stale: bool = True,
    rate: Literal["scaled", "base"] = "scaled",
) -> Iterator[Round]:
    """The rounds that `LocalOptimizer` makes of a run.

    Args:
        rule: for H; must not depend on the loss, which nobody knows beforehand.
        schedule: base learning rate as a function of progress.
        budget: S, the progress at which the run ends; with gain 1, its steps. The last round ends on the last step.
        scaling: the rule for the gain; None for gain 1.
        num_workers: K.
        accumulate: a, micro-batches per step.
        statistics: (G, σ²) that every estimate is taken to give; None for no estimate.
        stale: whether the first estimate comes with the first averaging (Alg. 1), or with the first step (Alg. 4).
        rate: which η the rule sees, "scaled" (gain · base rate) or "base".

    Raises:
        ValueError: the rule depends on the loss.
    """
    if rule.uses_loss:
        raise ValueError(
            f"{type(rule).__name__} depends on the training loss, which nobody knows beforehand: its rounds cannot be planned"
        )
    gains = _Gains(scaling or NoScaling(), num_workers, accumulate, budget, None if stale else statistics)
    done, progress, period, longest = 0, 0.0, 1, 0
    while not _ends(progress, budget):
        # The gain depends on H and H on the gain: as in LocalOptimizer, the rule sees the gain of the last H.
        seen = gains.gain(period, progress) if rate == "scaled" else 1.0
        lr = seen * schedule(progress)
        period = rule(RoundStart(lr=lr, gain=seen, progress=progress, longest=longest))
        steps, after = _walk(gains, period, progress, period)
        while steps < period:  # a shorter round may have a larger gain
            period = steps
            steps, after = _walk(gains, period, progress, period)
        longest = max(longest, period)
        yield Round(done, period, lr, gains.gain(period, progress), progress, after)
        done, progress, gains.statistics = done + period, after, statistics


def plan_steps(
    budget: float,
    scaling: Scaling,
    *,
    num_workers: int,
    accumulate: int,
    statistics: tuple[float, float] | None = None,
) -> tuple[int, float]:
    """What `SynchronousOptimizer` makes of a run; arguments as in `plan_rounds`.

    Returns:
        (optimizer steps, progress at the end).
    """
    gains = _Gains(scaling, num_workers, accumulate, budget, statistics)
    return _walk(gains, 1, 0.0, sys.maxsize)


@dataclass
class _Gains:
    """The gain, and the progress of a step, as functions of H; `statistics` are (G, σ²), None before the first estimate."""

    scaling: Scaling
    num_workers: int
    accumulate: int
    budget: float
    statistics: tuple[float, float] | None = None

    def gain(self, period: int, progress: float) -> float:
        return self.scaling.gain(self._scaling_context(period, progress))

    def progress(self, period: int) -> float:
        """The same for all steps of a round: what changes during a run is only the gain of a warm-up."""
        return self.scaling.progress(self._scaling_context(period, 0.0))

    def _scaling_context(self, period: int, progress: float) -> ScalingContext:
        grad_sqr, grad_var = self.statistics or (None, None)
        return ScalingContext(self.num_workers, self.accumulate, period, progress, self.budget, grad_sqr, grad_var)


def _walk(gains: _Gains, period: int, progress: float, limit: int) -> tuple[int, float]:
    """(steps until the budget is used up, at most `limit`; the progress after them), summed as an optimizer does."""
    steps = 0
    one = gains.progress(period)
    while steps < limit and not _ends(progress, gains.budget):
        progress += one
        steps += 1
    return steps, progress


def _ends(progress: float, budget: float) -> bool:
    return progress >= budget * (1 - 1e-9)  # as ReplicaOptimizer does
