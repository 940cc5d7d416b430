"""The kind "jpeg": JPEG files of any size, with labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.kinds.base import Assembly, Batch, Column, Effort, Empty, Facts, Samples, Selection
from hvdlocal.data.kinds.labelled import LabelledImages, labels_of

if TYPE_CHECKING:
    from hvdlocal.data.augment import Crop

_JPEGS_PER_PART = 8  # several parts per batch, so that all threads work on the batch that is wanted next


class Jpeg(LabelledImages):
    """Images as JPEG files. A batch is what `Crop` cuts out of them, uint8 (n, S, S, 3), and int64 (n,) labels."""

    name = "jpeg"
    per_sample = ("labels", "index", "dims")
    takes_crop = True

    def sound(self, facts: Facts) -> dict[str, bool]:
        """See `Kind`."""
        return {"shape": True} | super().sound(facts) if facts["shape"] is None else {"shape": False}

    def least_bytes(self, facts: Facts) -> int:
        """See `Kind`."""
        return 1

    def tables(self, facts: Facts, samples: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See `Kind`."""
        return {
            "offsets": ("<u8", (samples + 1,)),
            "dims": ("<u2", (samples, 2)),
            "labels": ("<i4", (samples,)),
            "index": ("<i8", (samples,)),
            "crc32": ("<u4", (samples,)),
        }

    def digested(self, names: Iterable[str]) -> Iterable[str]:
        """See `Kind`."""
        return "labels", "index", "crc32", "offsets", "dims"

    def columns(self, facts: Facts, samples: int, tables: Mapping[str, NDArray[Any]]) -> list[Column]:
        """See `Kind`."""
        offsets = tables["offsets"].astype(np.int64)
        if offsets[0] != 0 or not (np.diff(offsets) > 0).all():
            raise ValueError("/offsets that do not begin at 0 and ascend")
        return [Column("jpeg", np.dtype(np.uint8), (int(offsets[-1]),), np.arange(samples + 1), offsets)]

    def take(self, samples: Samples, rows: NDArray[np.int64], out: Any = None) -> Any:
        """Raises ValueError."""
        raise ValueError(
            "these samples are JPEGs, which are not gathered but decoded: use Loader with a crop, or bytes_of()"
        )

    def batch(
        self,
        samples: Samples,
        selection: Selection,
        crop: Crop | None,
        empty: Empty,
    ) -> Assembly:
        """See `Kind`."""
        from hvdlocal.data.kinds.decode import decode_crops  # and with it OpenCV, which nobody but JPEGs needs

        assert crop is not None
        rows = selection.samples
        images = empty((len(rows), crop.size, crop.size, 3), np.uint8)
        pixels = images.numpy()
        boxes = crop.boxes(samples.tables["dims"][rows], selection.keys)

        def decode(part: slice) -> Callable[[], Effort]:
            return lambda: Effort(*decode_crops(samples, rows[part], boxes[part], pixels[part]))

        def finish() -> Batch:
            return images, labels_of(samples, rows, empty)

        return Assembly(
            [decode(slice(i, i + _JPEGS_PER_PART)) for i in range(0, max(len(rows), 1), _JPEGS_PER_PART)], finish
        )
