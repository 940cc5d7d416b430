"""How often a checkpoint pays."""

from __future__ import annotations

import math

from hvdlocal.training.config import CheckpointConfig

FIRST_SECONDS = 10.0
"""Until the first checkpoint, which tells what one costs."""

WRITING_SHARE = 0.05
"""Share of the time that the disk may be busy with checkpoints: writing takes no time from training, but may from other jobs."""


def young_interval(cost: float, failure_seconds: float) -> float:
    """The time between two checkpoints that loses least, √(2 · cost · mean time between failures) (Young 1974, Eq. 1).

    Args:
        cost: seconds by which one checkpoint holds up the run.
        failure_seconds: mean time between failures.
    """
    return math.sqrt(2 * cost * failure_seconds)


class CheckpointInterval:
    """Says when the next checkpoint is due by the clock; `every_steps` needs no clock and is the trainer's."""

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
        """Counts from `now`, in seconds of a clock that only runs forwards."""
        self._last = now

    def due(self, now: float) -> bool:
        """Whether a checkpoint is due."""
        return self._by_clock and now - self._last >= self._interval

    def learn(self, cost: float, writing: float) -> None:
        """Takes in what a checkpoint came to.

        Args:
            cost: seconds by which it held up training.
            writing: seconds until it was on disk.
        """
        if self._minutes is None:
            self._interval = max(young_interval(cost, self._failure_seconds), writing / WRITING_SHARE)
