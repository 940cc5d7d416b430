"""The time of a run's averagings: what training waits for, and what goes on behind its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hvdlocal.plan.run_plan import RunPlan


@dataclass(frozen=True)
class AveragingTime:
    """Seconds of averaging.

    Attributes:
        each: of one averaging, which takes as long beside steps as alone.
        exposed: of the whole run, the part that training waits for.
        hidden: the part during which steps are taken.
        free_from: the smallest overlap τ, in steps, with which nothing is exposed in a round of as many steps; None if a step's
            time is not known.
    """

    each: float
    exposed: float
    hidden: float
    free_from: int | None

    @classmethod
    def of(cls, plan: RunPlan, each: float, step_seconds: float | None = None) -> AveragingTime:
        """Returns the time of a planned run: an average under way beside n steps is exposed for max(0, each − n · step).

        Args:
            plan: the run.
            each: seconds of one averaging alone.
            step_seconds: time of one optimizer step without communication; needed by a plan with overlap.

        Raises:
            ValueError: the plan has overlap, and a step's time is not known.
        """
        if plan.num_workers == 1:
            return cls(0.0, 0.0, 0.0, 0)
        if step_seconds is None and any(plan.overlapped):
            raise ValueError(
                f"an averaging of {each:g} s is hidden behind steps whose time is not known: give --step-seconds"
            )
        step = step_seconds or 0.0
        hidden = sum(count * min(each, steps * step) for steps, count in plan.overlapped.items())
        free_from = None if step_seconds is None else math.ceil(each / step_seconds - 1e-9)
        return cls(each, plan.rounds * each - hidden, hidden, free_from)
