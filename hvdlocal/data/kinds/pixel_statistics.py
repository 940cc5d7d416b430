"""Mean and standard deviation of pixels from exact integer counts, so that no order of summation can change them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def add_pixels(histogram: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
    """Counts the pixels of uint8 (…, C) images into the histogram, int64 (C, 256), in place."""
    for channel, counts in enumerate(histogram):
        counts += np.bincount(images[..., channel].ravel(), minlength=256)


def mean_and_std(histogram: NDArray[np.int64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of pixel / 255 per channel of a histogram (C, 256)."""
    sums = [
        (
            sum(value * count for value, count in enumerate(counts)),
            sum(value**2 * count for value, count in enumerate(counts)),
        )
        for counts in histogram.tolist()
    ]
    return mean_and_std_of_sums(sums, sum(histogram[0].tolist()))


def mean_and_std_of_sums(sums: Sequence[tuple[int, int]], count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The same of the sum of the pixels and the sum of their squares per channel.

    Args:
        sums: of each channel.
        count: number of pixels per channel.
    """
    mean = tuple(total / (255 * count) for total, _ in sums)
    std = tuple(math.sqrt(count * squares - total * total) / (255 * count) for total, squares in sums)
    return mean, std
