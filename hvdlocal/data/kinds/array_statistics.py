"""Mean, standard deviation and range of the numbers of an array, from parts that are merged in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class Moments:
    """What was found in the numbers of some samples.

    Attributes:
        count: how many are finite.
        mean: of these, in float64.
        squares: sum of their squared differences from the mean.
        min, max: of these; None if there are none.
        nan, inf: how many are not.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    min: int | float | None = None
    max: int | float | None = None
    nan: int = 0
    inf: int = 0

    def add(self, values: NDArray[Any]) -> None:
        """Merges what is in an array of numbers into this."""
        self.merge(_moments(values))

    def merge(self, other: Moments) -> None:
        """Merges what was found in other samples into this (Chan et al., 1979)."""
        self.nan += other.nan
        self.inf += other.inf
        if not other.count:
            return
        count = self.count + other.count
        apart = other.mean - self.mean
        with np.errstate(over="ignore", invalid="ignore"):
            self.squares += float(other.squares + np.float64(apart) ** 2 * self.count * other.count / count)
        self.mean += apart * other.count / count
        self.count = count
        self.min = other.min if self.min is None else min(self.min, other.min)  # type: ignore[type-var]
        self.max = other.max if self.max is None else max(self.max, other.max)  # type: ignore[type-var]

    def as_dict(self) -> dict[str, Any]:
        """The attributes, for JSON."""
        return asdict(self)


def combine_moments(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of a manifest: `mean`, `std`, `min`, `max`, `nan` and `inf`, from the moments of all shards in order.

    What no double can hold, or does not exist without finite numbers, is None.
    """
    whole = Moments()
    for part in parts:
        whole.merge(Moments(**part))
    std = math.sqrt(whole.squares / whole.count) if whole.count and math.isfinite(whole.squares) else None
    mean = whole.mean if whole.count and math.isfinite(whole.mean) else None
    return {"mean": mean, "std": std, "min": whole.min, "max": whole.max, "nan": whole.nan, "inf": whole.inf}


def sound_moments(statistics: Any) -> bool:
    """Whether these can be the statistics of an array; they come from a file."""
    if not isinstance(statistics, dict) or statistics.keys() != {"mean", "std", "min", "max", "nan", "inf"}:
        return False
    numbers = [statistics[name] for name in ("mean", "std", "min", "max")]
    counts = [statistics["nan"], statistics["inf"]]
    return all(
        type(number) in (int, float) and math.isfinite(number) for number in numbers if number is not None
    ) and all(type(count) is int and count >= 0 for count in counts)


def _moments(values: NDArray[Any]) -> Moments:
    nan = inf = 0
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        if not finite.all():
            nan = int(np.isnan(values).sum())
            inf = int(values.size - finite.sum()) - nan
            values = values[finite]
    if not values.size:
        return Moments(nan=nan, inf=inf)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = float(values.mean(dtype=np.float64))
        squares = float(np.square(values.astype(np.float64) - mean).sum())
    least, most = values.min().item(), values.max().item()
    return Moments(values.size, mean, squares, _number(least), _number(most), nan, inf)


def _number(value: Any) -> int | float:
    return int(value) if isinstance(value, bool) else value
