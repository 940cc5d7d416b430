"""The values of m from which local steps pay: pseudo wall-clock time (Eq. 16) at each method's best period."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise, product

from hvdlocal.plan.cost import pseudo_wall_clock


def skyline(epochs: Mapping[int, float], num_workers: int, m: float) -> float:
    """Returns the least pseudo wall-clock time over the given periods: the dark lines of Fig. 2.

    Args:
        epochs: n(K, H) by H.
        num_workers: K.
        m: time of one synchronisation divided by the time of one local step.

    Returns:
        Time in units of one epoch on one worker.
    """
    return min(pseudo_wall_clock(n, num_workers, period, m) for period, n in epochs.items())


def crossovers(before: Mapping[int, float], after: Mapping[int, float]) -> list[float]:
    """Returns the values of m > 0 at which the faster of two methods, each at its best period, changes.

    The result is exact: a skyline consists of straight lines n (1 + m/H), so the order can only change where a line of one
    method meets a line of the other. K divides both and cancels.

    Args:
        before: n(K, H) of one method, by H.
        after: n(K, H) of the other method, by H.
    """
    meetings = set()
    for (period_a, n_a), (period_b, n_b) in product(before.items(), after.items()):
        slope = n_b / period_b - n_a / period_a
        if slope and (m := (n_a - n_b) / slope) > 0:
            meetings.add(m)
    edges = [0.0, *sorted(meetings)]
    middles = [(low + high) / 2 for low, high in pairwise(edges)] + [edges[-1] + 1]
    ahead = [skyline(after, 1, m) - skyline(before, 1, m) < 0 for m in middles]
    return [edge for edge, (was, now) in zip(edges[1:], pairwise(ahead), strict=True) if was != now]
