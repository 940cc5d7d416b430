"""Images as CIFAR and downsampled ImageNet store them: rows of one colour plane after the other, in several files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class PlanarImages:
    """Presents rows (n, C·S·S) of uint8 as images (N, S, S, C), converted as they are read.

    Args:
        parts: one or more arrays of rows, typically maps of files; image i is row i of them laid end to end.
        side: S.
    """

    def __init__(self, parts: Sequence[NDArray[np.uint8]], side: int, channels: int = 3) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0] + [len(part) for part in self._parts])
        self.shape = (int(self._starts[-1]), side, side, channels)
        self.dtype = np.dtype(np.uint8)

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images with the given, ascending indices: uint8 (n, S, S, C)."""
        _, side, _, channels = self.shape
        images = np.empty((len(rows), side, side, channels), np.uint8)
        cuts = np.searchsorted(rows, self._starts)
        for part, start, lower, upper in zip(self._parts, self._starts, cuts, cuts[1:], strict=False):
            planes = part[rows[lower:upper] - start].reshape(-1, channels, side, side)
            images[lower:upper] = planes.transpose(0, 2, 3, 1)
        return images
