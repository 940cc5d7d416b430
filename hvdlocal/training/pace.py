"""How fast a run is, and how long it will still take."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

MARKS = 60
"""The number of log intervals over which the remaining time is estimated, so that it follows a pace that changes."""


class Mark(NamedTuple):
    """What was done at a moment of training.

    Attributes:
        progress: in scale-invariant iterations.
        samples: handed out by this rank's loader.
        seconds: of training, without those between an interruption and the next start.
        evaluating: seconds of them that were spent on evaluations.
    """

    progress: float
    samples: int
    seconds: float
    evaluating: float


class Pace:
    """Measures speed between marks. What an earlier start of the run took has no influence.

    Args:
        budget: progress at which the run ends.
        start: where this start of the run begins or continues.
    """

    def __init__(self, budget: float, start: Mark) -> None:
        self._budget = budget
        self._marks = deque([start], maxlen=MARKS)

    def add(self, mark: Mark) -> None:
        """Adds a mark at the end of a log interval."""
        self._marks.append(mark)

    @property
    def samples_per_second(self) -> float | None:
        """Samples of this rank in a second of the last log interval, without evaluations; None before the first."""
        if len(self._marks) < 2:
            return None
        before, last = self._marks[-2], self._marks[-1]
        seconds = (last.seconds - last.evaluating) - (before.seconds - before.evaluating)
        return (last.samples - before.samples) / seconds if seconds > 0 else None

    def remaining_seconds(self, progress: float, seconds: float) -> float | None:
        """Estimates the time to the end of the budget, evaluations included; None without progress in this start.

        Args:
            progress, seconds: now.
        """
        first = self._marks[0]
        if progress <= first.progress:
            return None
        pace = (seconds - first.seconds) / (progress - first.progress)
        return max(0.0, self._budget - progress) * pace
