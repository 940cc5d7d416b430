"""A schedule's rounds without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hvdlocal.averaging.period import PeriodRule, RoundStart


@dataclass(frozen=True)
class Round:
    """A round: the step it starts at, its length H, and the learning rate of its first step."""

    start: int
    period: int
    lr: float


def plan_rounds(rule: PeriodRule, schedule: Callable[[float], float], steps: int) -> Iterator[Round]:
    """The rounds of a run of `steps` steps with gain 1.

    Args:
        rule: for H; must not depend on the loss, which nobody knows beforehand.
        schedule: learning rate of a step, counted from 0.
        steps: optimizer steps of the run; the last round ends on the last one.
    """
    if rule.uses_loss:
        raise ValueError(f"{type(rule).__name__} depends on the training loss: its rounds cannot be planned")
    done = 0
    while done < steps:
        lr = schedule(done)
        period = min(rule(RoundStart(lr=lr, progress=done)), steps - done)
        yield Round(done, period, lr)
        done += period
