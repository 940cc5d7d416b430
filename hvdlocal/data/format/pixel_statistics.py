"""Mean and standard deviation of pixels from exact integer counts, so that no order of summation can change them."""

import math

import numpy as np
from numpy.typing import NDArray


def add_pixels(histogram: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
    """Count the pixels of uint8 (…, C) images into the histogram, int64 (C, 256), in place."""
    for channel, counts in enumerate(histogram):
        counts += np.bincount(images[..., channel].ravel(), minlength=256)


def mean_and_std(histogram: NDArray[np.int64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of pixel / 255 per channel of a histogram (C, 256)."""
    mean, std = [], []
    for counts in histogram.tolist():
        n = sum(counts)
        total = sum(value * count for value, count in enumerate(counts))
        squares = sum(value * value * count for value, count in enumerate(counts))
        mean.append(total / (255 * n))
        std.append(math.sqrt(n * squares - total * total) / (255 * n))
    return tuple(mean), tuple(std)
