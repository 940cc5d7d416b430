"""The papers' model of what a run costs in time."""

from __future__ import annotations


def pseudo_wall_clock(epochs: float, num_workers: int, period: int, m: float) -> float:
    """Returns the time of a run in units of one epoch on one worker, T = n/K · (1 + m/H) (Balles et al., Eq. 16).

    Args:
        epochs: n(K, H), the passes over the data that the run needs to reach its target.
        num_workers: K.
        period: H.
        m: time of one synchronisation divided by the time of one local step without synchronisation.

    Raises:
        ValueError: an argument is out of range.
    """
    if num_workers < 1 or period < 1 or epochs < 0 or m < 0:
        raise ValueError(
            f"epochs={epochs} and m={m} must be ≥ 0, num_workers={num_workers} and period={period} at least 1"
        )
    return epochs / num_workers * (1 + m / period)
