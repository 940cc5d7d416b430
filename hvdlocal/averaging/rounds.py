"""How the rounds of a run are chosen, for the optimizers that take them and for plans of runs that nobody has started."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol

from hvdlocal.averaging.gain import NoScaling, Scaling, ScalingContext
from hvdlocal.averaging.period import PeriodRule, RoundStart


class Estimates(Protocol):
    """Estimates of the gradient statistics; None before the first."""

    @property
    def grad_sqr(self) -> float | None:
        """G = ‖∇f‖²."""

    @property
    def grad_var(self) -> float | None:
        """σ², the variance of one worker's gradient of one micro-batch."""


class AssumedEstimates(NamedTuple):
    """Estimates that a plan assumes."""

    grad_sqr: float | None = None
    grad_var: float | None = None


class Progress:
    """How far a run has come in scale-invariant iterations, and the gain of its steps.

    Args:
        scaling: the rule for the gain.
        workers: returns K, which becomes smaller when ranks are lost.
        accumulate: a, micro-batches per step.
        budget: S, the progress at which the run ends; None for no end.
        estimates: from which the gain follows where it depends on gradient statistics.

    Attributes:
        done: s, scale-invariant iterations done.
        gain: ρ of the last step.
    """

    def __init__(
        self,
        scaling: Scaling,
        workers: Callable[[], int],
        accumulate: int,
        budget: float | None,
        estimates: Estimates,
    ) -> None:
        self.scaling = scaling
        self._workers = workers
        self.accumulate = accumulate
        self.budget = budget
        self.estimates = estimates
        self.done = 0.0
        self.gain = 1.0

    @property
    def num_workers(self) -> int:
        """K."""
        return self._workers()

    def context(self, period: int, progress: float | None = None) -> ScalingContext:
        """What the scaling rule sees before a step of a round of `period` steps.

        Args:
            period: H.
            progress: of the step; None for the next one.
        """
        return ScalingContext(
            num_workers=self.num_workers,
            accumulate=self.accumulate,
            period=period,
            progress=self.done if progress is None else progress,
            budget=self.budget,
            grad_sqr=self.estimates.grad_sqr,
            grad_var=self.estimates.grad_var,
        )

    def ended(self) -> bool:
        """Whether the budget is used up; never without a budget."""
        return self.done >= self._end

    @property
    def _end(self) -> float:
        """The progress at which the budget is used up; gains are summed with rounding errors."""
        return math.inf if self.budget is None else self.budget * (1 - 1e-9)

    def walk(self, period: int, limit: int) -> tuple[int, float]:
        """Counts steps of rounds of `period` steps until the budget is used up.

        Args:
            period: H.
            limit: the most steps to count, at least 1.

        Returns:
            (steps, at least 1; the progress after them).
        """
        steps, progress = 0, self.done
        one = self.scaling.progress(self.context(period))
        while True:
            progress += one
            steps += 1
            if steps >= limit or progress >= self._end:
                return steps, progress
            if self.scaling.progress_varies:
                one = self.scaling.progress(self.context(period, progress))

    def count(self, now: ScalingContext, gain: float) -> None:
        """Counts a step that was taken with this gain."""
        self.gain = gain
        self.done += self.scaling.progress(now)


class NextRound(NamedTuple):
    """A round as it is chosen before its first step.

    Attributes:
        period: H, its steps.
        lr: η, the learning rate that the rule for H saw.
        end: the progress at its end; None without a budget.
        limited: the limit of the rule for this round, if the rule asked for it or for more; else None.
    """

    period: int
    lr: float
    end: float | None
    limited: int | None


class RoundPlanner:
    """Chooses the period of one round after the other.

    Args:
        rule: for H.
        progress: of the run.
        rate: which η the rule sees: "scaled" (gain · base rate) or "base".

    Attributes:
        period: H of the round that was chosen last; 1 before the first.
        max_lr: the largest η so far.
        longest: steps of the longest round so far.
        first_loss: the mean loss of the first round that has one.
    """

    def __init__(self, rule: PeriodRule, progress: Progress, rate: Literal["scaled", "base"]) -> None:
        self.rule = rule
        self.rate = rate
        self.period = 1
        self.max_lr = 0.0
        self.longest = 0
        self.first_loss: float | None = None
        self._progress = progress

    def next_round(self, base_lr: float, loss: float | None = None) -> NextRound:
        """Chooses the round that starts now. With a budget, the last round ends on the step that uses it up.

        Args:
            base_lr: γ, the base learning rate.
            loss: the mean training loss of the last round; None before there is one.
        """
        now = self._progress
        # The gain depends on H and H on the gain: the rule sees the rate that the last H would give now.
        gain = now.scaling.gain(now.context(self.period)) if self.rate == "scaled" else 1.0
        lr = gain * base_lr
        self.max_lr = max(self.max_lr, lr)
        start = RoundStart(
            lr=lr,
            gain=gain,
            progress=now.done,
            loss=loss,
            max_lr=self.max_lr,
            first_loss=self.first_loss,
            longest=self.longest,
        )
        period = asked = self.rule(start)
        end = None
        if now.budget is not None:
            steps, end = now.walk(period, period)
            while steps < period:  # a shorter round may have a larger gain
                period = steps
                steps, end = now.walk(period, period)
        limited = asked if asked == self.rule.limit(start) else None
        self.period = period
        self.longest = max(self.longest, period)
        return NextRound(period, lr, end, limited)

    def state(self) -> dict[str, float | None]:
        """Plain numbers."""
        return {
            "period": self.period,
            "max_lr": self.max_lr,
            "longest_period": self.longest,
            "first_loss": self.first_loss,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The reverse of `state`."""
        self.period = state["period"]
        self.max_lr = state["max_lr"]
        self.longest = state.get("longest_period", self.period)  # older states lack it
        self.first_loss = state["first_loss"]


class Round(NamedTuple):
    """A round of a plan.

    Attributes:
        start: the step it starts at, from 0.
        period: H, its steps.
        lr: η, the learning rate that the rule for H saw.
        gain: ρ of its first step.
        progress: scale-invariant iterations done when it starts.
        end: and when it ends.
        overlapped: the steps of the next round during which its average is under way.
    """

    start: int
    period: int
    lr: float
    gain: float
    progress: float
    end: float
    overlapped: int = 0


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
    overlap: int = 0,
    evaluate_every: float = math.inf,
) -> Iterator[Round]:
    """The rounds that `LocalOptimizer` makes of a run.

    Args:
        rule: for H; must not depend on the loss, which is not known beforehand.
        schedule: base learning rate as a function of progress.
        budget: S, the progress at which the run ends; with gain 1, its steps. The last round ends on the last step.
        scaling: the rule for the gain; None for gain 1.
        num_workers: K.
        accumulate: a, micro-batches per step.
        statistics: (G, σ²) that every estimate is taken to give; None for no estimate.
        stale: whether the first estimate comes with the first averaging (Alg. 1), or with the first step (Alg. 4).
        rate: which η the rule sees, "scaled" (gain · base rate) or "base".
        overlap: τ, the steps of the next round after which an average is applied; 0 applies it at once. A rule uses what travels
            with it from the beginning of the round after that on.
        evaluate_every: progress between two evaluations, each at the first end of a round that is due. An evaluation and the end
            of the run wait for the average.

    Raises:
        ValueError: the rule depends on the loss.
    """
    if rule.uses_loss:
        raise ValueError(
            f"{type(rule).__name__} depends on the training loss, which is not known beforehand: its rounds cannot be planned"
        )
    none, later = AssumedEstimates(), AssumedEstimates(*(statistics or ()))
    progress = Progress(scaling or NoScaling(), lambda: num_workers, accumulate, budget, none if stale else later)
    planner = RoundPlanner(rule, progress, rate)
    start, evaluation = 0, evaluate_every
    pending: Round | None = None  # the average of this round is applied in the next one
    while not progress.ended():
        period, lr, end, _ = planner.next_round(schedule(progress.done))
        assert end is not None
        now = Round(start, period, lr, progress.scaling.gain(progress.context(period)), progress.done, end)
        start, progress.done = start + period, end
        if pending:
            yield pending._replace(overlapped=min(overlap, period))
            progress.estimates = later
        evaluated = end >= evaluation
        if evaluated:
            evaluation = (end // evaluate_every + 1) * evaluate_every
        pending = now if overlap and not evaluated else None
        if not pending:
            yield now
            progress.estimates = later
    if pending:
        yield pending


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
    estimates = AssumedEstimates(*(statistics or ()))
    return Progress(scaling, lambda: num_workers, accumulate, budget, estimates).walk(1, sys.maxsize)
