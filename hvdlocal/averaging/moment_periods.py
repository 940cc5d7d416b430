"""Which periods, in rounds, the averaged moments of an optimizer can have. Arithmetic on numbers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from numbers import Integral
from typing import Any


def check_moment_periods(periods: Mapping[str, Any], setting: str) -> None:
    """Refuses periods that are no numbers of rounds, or of which one does not divide another.

    What is sent in any round is then one contiguous message, with the moments of longer periods behind.

    Args:
        periods: rounds from one average of a moment to the next, by the moments' names.
        setting: the name under which the user gave them.

    Raises:
        ValueError: naming the moments, their periods and the remedy.
    """
    given = f"{setting}={dict(periods)}"
    for name, period in periods.items():
        if isinstance(period, bool) or not (isinstance(period, Integral) and int(period) >= 1):
            raise ValueError(
                f"{given}: the period of {name} must be a whole number of at least 1; leave out a moment that each rank keeps "
                "for itself"
            )
    for (shorter, few), (longer, many) in pairwise(sorted(periods.items(), key=lambda item: item[1])):
        if many % few:
            raise ValueError(
                f"{given}: the period of {longer}, {many}, must be a multiple of {few}, that of {shorter}, so that both travel "
                f"in one message: choose {many - many % few} or {many - many % few + few}"
            )
