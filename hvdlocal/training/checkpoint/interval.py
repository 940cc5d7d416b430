"""How often a checkpoint is worth its cost."""

from __future__ import annotations

import math

from hvdlocal.training.config import CheckpointConfig

FIRST_SECONDS = 10.0
"""Seconds until the first checkpoint, which shows what a checkpoint costs."""

WRITING_SHARE = 0.05
"""Largest share of the time in which the disk writes checkpoints: this does not delay training, but may delay other jobs."""


def young_interval(cost: float, failure_seconds: float) -> float:
    """The time between two checkpoints that loses least, √(2 · cost · mean time between failures) (Young 1974, Eq. 1).

    Args:
        cost: seconds by which one checkpoint holds up the run.
        failure_seconds: mean time between failures.
    """
    return math.sqrt(2 * cost * failure_seconds)


class CheckpointInterval:
    """Decides when the next checkpoint is due by the clock; `every_steps` needs no clock and is left to the coordinator."""

    def __init__(self, config: CheckpointConfig) -> None:
        self._minutes = config.every_minutes
        self._failure_seconds = 3600 * config.failure_hours
        self._by_clock = config.every_steps is None
        self._interval = FIRST_SECONDS if self._minutes is None else 60 * self._minutes
        self._last = 0.0

    @property
    def interval(self) -> float:
        """Seconds between two checkpoints."""
        return self._interval

    def start(self, now: float) -> None:
        """Starts an interval at `now`, in seconds of a clock that only runs forwards."""
        self._last = now

    def due(self, now: float) -> bool:
        """Returns whether a checkpoint is due."""
        return self._by_clock and now - self._last >= self._interval

    def learn(self, cost: float, writing: float) -> None:
        """Adapts the interval to the cost of a checkpoint.

        Args:
            cost: seconds by which the checkpoint delayed training.
            writing: seconds until it was on disk.
        """
        if self._minutes is None:
            self._interval = max(young_interval(cost, self._failure_seconds), writing / WRITING_SHARE)
