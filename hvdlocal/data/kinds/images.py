"""The kind "images": uint8 images of one size, with labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.kinds.base import (
    Assembly,
    Batch,
    Column,
    Empty,
    Facts,
    Samples,
    Selection,
    is_whole,
    timed,
    units_of,
)
from hvdlocal.data.kinds.labelled import LabelledImages, labels_of

if TYPE_CHECKING:
    from hvdlocal.data.augment import Crop

CRC_BLOCK = 64  # images per checksum: small enough to name the damage, large enough to cost 0.02 % of the bytes

_UINT8 = np.dtype(np.uint8)  # comparing with a dtype is many times as fast as comparing with the type np.uint8


class Images(LabelledImages):
    """Images as their pixels, uint8 (height, width, channels). A batch is uint8 (n, H, W, C) and int64 (n,) labels."""

    name = "images"

    def sound(self, facts: Facts) -> dict[str, bool]:
        """See `Kind`."""
        shape = facts["shape"]
        whole = isinstance(shape, tuple) and len(shape) == 3 and all(is_whole(side, 1) for side in shape)
        return {"shape": whole} | (super().sound(facts) if whole else {})

    def least_bytes(self, facts: Facts) -> int:
        """See `Kind`."""
        return math.prod(facts["shape"])

    def tables(self, facts: Facts, samples: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See `Kind`."""
        units = -(-samples // CRC_BLOCK)
        return {"labels": ("<i4", (samples,)), "index": ("<i8", (samples,)), "crc32": ("<u4", (units,))}

    def columns(self, facts: Facts, samples: int, tables: Mapping[str, NDArray[Any]]) -> list[Column]:
        """See `Kind`."""
        return [Column("images", _UINT8, (samples, *facts["shape"]), units_of(samples, CRC_BLOCK))]

    def take(self, samples: Samples, rows: NDArray[np.int64], out: Any = None) -> Any:
        """See `Kind`; `out` is uint8 (n, H, W, C)."""
        shape = (len(rows), *samples.facts["shape"])
        if out is None:
            out = np.empty(shape, np.uint8)
        elif out.shape != shape or out.dtype != _UINT8 or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}; C-contiguous uint8 {shape} is needed")
        samples.gather(rows, out)
        return out

    def batch(
        self,
        samples: Samples,
        selection: Selection,
        crop: Crop | None,
        empty: Empty,
    ) -> Assembly:
        """See `Kind`."""
        rows = selection.samples
        images = empty((len(rows), *samples.facts["shape"]), np.uint8)

        def read() -> int:
            pixels = images.numpy()
            samples.gather(rows, pixels)
            return pixels.nbytes

        def finish() -> Batch:
            return images, labels_of(samples, rows, empty)

        return Assembly([timed(read)], finish)
