"""What time costs: the papers' model of synchronisation, and that of checkpoints."""

from __future__ import annotations

import math


def pseudo_wall_clock(epochs: float, num_workers: int, period: int, m: float) -> float:
    """Time of a run in units of one epoch on one worker, T = n/K · (1 + m/H) (Balles et al., Eq. 16).

    Args:
        epochs: n(K, H), passes over the data that the run takes to its target.
        num_workers: K.
        period: H.
        m: time of one synchronisation over the time of one local step without it.

    Raises:
        ValueError: an argument is out of range.
    """
    if num_workers < 1 or period < 1 or epochs < 0 or m < 0:
        raise ValueError(
            f"epochs={epochs} and m={m} must be ≥ 0, num_workers={num_workers} and period={period} at least 1"
        )
    return epochs / num_workers * (1 + m / period)


def young_interval(cost: float, failure_seconds: float) -> float:
    """The time between two checkpoints that loses least, √(2 · cost · mean time between failures) (Young 1974, Eq. 1).

    Args:
        cost: seconds by which one checkpoint holds up the run.
        failure_seconds: mean time between failures.
    """
    return math.sqrt(2 * cost * failure_seconds)
