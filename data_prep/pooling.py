"""Smaller images: each pixel the mean of a square of pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvdlocal.data import ImageSource


class PooledImages:
    """Presents images (N, H, W, C) of uint8 as (N, H/P, W/P, C), pooled as they are read and rounded, halves to even.

    Args:
        images: what is pooled.
        pool: P, the side of a square; must divide H and W.

    Raises:
        ValueError: it does not.
    """

    def __init__(self, images: ImageSource, pool: int) -> None:
        number, height, width, channels = images.shape
        if pool < 1 or height % pool or width % pool:
            raise ValueError(f"--pool {pool}: must divide the images' sides, {height} and {width}")
        self._images = images
        self._pool = pool
        self.shape = (number, height // pool, width // pool, channels)
        self.dtype = np.dtype(np.uint8)

    def __getitem__(self, rows: NDArray[np.int64]) -> ArrayLike:
        """The images with the given, ascending indices: uint8 (n, H/P, W/P, C)."""
        _, height, width, channels = self.shape
        squares = np.asarray(self._images[rows]).reshape(-1, height, self._pool, width, self._pool, channels)
        return np.rint(squares.mean((2, 4))).astype(np.uint8)
