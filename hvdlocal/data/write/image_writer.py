"""Writing a split of equally sized images as HDF5 shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvdlocal.communicator import succeed_together
from hvdlocal.data.format.manifest import Manifest, ShardEntry
from hvdlocal.data.kinds.images import CRC_BLOCK
from hvdlocal.data.kinds.pixel_statistics import add_pixels
from hvdlocal.data.write.labelled_writer import LabelledWriter
from hvdlocal.data.write.shard_writer import write_shard
from hvdlocal.data.write.staging import Receipt


class ImageSource(Protocol):
    """Images (N, H, W, C) that can be read by an ascending int64 index array: ndarray, memmap, h5py dataset …"""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, (N, H, W, C)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type, which must be uint8."""

    def __getitem__(self, rows: NDArray[np.int64], /) -> ArrayLike:
        """The images with the given, ascending indices."""


class ShardWriter(LabelledWriter):
    """Writes one split of a data set of equally sized images as HDF5 shards.

    The result is `<directory>/<split>/manifest.json` beside `<split>-00000-of-00004.h5` and so on. The samples are
    shuffled once, on disk, so that any run of neighbours is a fair sample of the classes. The arguments are
    `SplitWriter`'s.
    """

    def write(
        self,
        images: ImageSource,
        labels: ArrayLike,
        *,
        identity: str | None = None,
        preparation: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Writes the split and returns its manifest.

        Every shard is written under a temporary name, flushed, read back and compared; only when all are good do they
        take their places, the manifest last. A data set without a manifest is thus an unfinished one; writing it again
        keeps the shards that are finished. If the same data set is there already, whole, its files are left untouched.

        Args:
            images: uint8 (N, H, W, C), array-like; read lazily, 64 images at a time.
            labels: integers (N,) in 0..len(classes)-1.
            identity: what identifies the content of `images`; by default a hash of all of it, for which they are read
                once more.
            preparation: facts that the manifest shall record.

        Raises:
            ValueError: images or labels do not fit that description, or N < num_shards.
            FileExistsError: a different data set is there and `overwrite` is not set.
        """

        def check() -> tuple[NDArray[np.int32], str]:
            if len(images.shape) != 4 or images.dtype != np.uint8 or 0 in images.shape:
                raise ValueError(
                    f"images are {images.dtype} {tuple(images.shape)}; "
                    "uint8 (N, height, width, channels) without an empty axis is needed"
                )
            if images.shape[1] <= 4 < images.shape[3]:
                raise ValueError(
                    f"images of shape {tuple(images.shape)} have their channels first; (N, height, width, channels) is needed, "
                    "as numpy.moveaxis(images, 1, 3) makes it"
                )
            return self._check_labels(labels, images.shape[0], "images"), identity or _sha256_of_images(images)

        label_array, source = succeed_together(self._communicator, check, "data.check")
        height, width, channels = images.shape[1:]
        draft = self._labelled_draft("images", (height, width, channels), label_array, source)

        def write(path: Path, name: str, rows: NDArray[np.int64]) -> Receipt:
            histogram = np.zeros((channels, 256), np.int64)
            blocks = self._blocks(images, rows, histogram)
            sha256 = write_shard(path, draft, len(rows), [blocks], {"labels": label_array[rows], "index": rows})
            return Receipt(ShardEntry(name, len(rows), path.stat().st_size, sha256), histogram.tolist())

        return self._write_split(draft, len(label_array), write, preparation or {})

    def _blocks(
        self, images: ImageSource, rows: NDArray[np.int64], histogram: NDArray[np.int64]
    ) -> Iterator[NDArray[np.uint8]]:
        """The images of the given rows in blocks of CRC_BLOCK, counted into the histogram (C, 256) on their way."""
        for start in range(0, len(rows), CRC_BLOCK):
            wanted = rows[start : start + CRC_BLOCK]
            ascending = np.argsort(wanted)  # h5py and files read by ascending index only, or best
            block = np.empty((len(wanted), *images.shape[1:]), np.uint8)
            block[ascending] = images[wanted[ascending]]
            add_pixels(histogram, block)
            yield block
            self._tell(len(block))


def _sha256_of_images(images: ImageSource) -> str:
    digest = hashlib.sha256()
    count = images.shape[0]
    step = max(1, (8 << 20) // int(np.prod(images.shape[1:])))
    for start in range(0, count, step):
        rows = np.arange(start, min(start + step, count), dtype=np.int64)
        digest.update(np.ascontiguousarray(images[rows]).data)
    return digest.hexdigest()
