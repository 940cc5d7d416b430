"""Reading a split: samples by index, at the speed of memory."""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvdlocal.data.manifest import MANIFEST_NAME, Manifest, split_directory
from hvdlocal.data.shard import open_shard, shard_attributes


class ShardedDataset:
    """One split of a data set, opened for reading.

    Labels and checksums lie in memory, the images are mapped from their files; no HDF5 handle stays open. Reading is
    safe from any number of threads.

    Args:
        directory: where the data set lives.
        split: name of the split, e.g. "train".

    Raises:
        FileNotFoundError: there is no finished data set, or one of its shards is missing.
        ValueError: a shard is truncated, or does not belong to the manifest; the message names the file.
    """

    def __init__(self, directory: str | Path, split: str = "train") -> None:
        folder = split_directory(directory, split)
        self._manifest = manifest = Manifest.load(folder / MANIFEST_NAME)
        attributes = shard_attributes(split, manifest.seed, manifest.classes)
        self._shards = []
        for entry in manifest.shards:
            path = folder / entry.file
            if path.is_file() and (size := path.stat().st_size) != entry.bytes:
                raise ValueError(f"{path} has {size} bytes where the manifest says {entry.bytes}; copy it again")
            shard = open_shard(path, (entry.num_samples, *manifest.shape), attributes)
            if shard.sha256 != entry.sha256:
                raise ValueError(
                    f"{path} is not the shard that {MANIFEST_NAME} describes (stale manifest or shard); copy both again"
                )
            self._shards.append(shard)
        self._starts = np.cumsum([0] + [entry.num_samples for entry in manifest.shards])
        self.labels: NDArray[np.int32] = np.concatenate([shard.labels for shard in self._shards])
        self.index: NDArray[np.int64] = np.concatenate([shard.index for shard in self._shards])
        if self.labels.min() < 0 or self.labels.max() >= self.num_classes:
            raise ValueError(
                f"{folder} holds labels {self.labels.min()}..{self.labels.max()} but names {self.num_classes} classes"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        return self._manifest.shape

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label i means classes[i]."""
        return self._manifest.classes

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self._manifest.classes)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of pixel / 255 over the split, per channel."""
        return self._manifest.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Population standard deviation of pixel / 255 over the split, per channel."""
        return self._manifest.std

    @property
    def fingerprint(self) -> str:
        """Hex sha256 that identifies the data and their order."""
        return self._manifest.fingerprint

    def take(self, indices: ArrayLike, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Gather images.

        Args:
            indices: integers (n,) in 0..len(self)-1, in any order, repeats allowed.
            out: C-contiguous uint8 (n, H, W, C) to fill; allocated if not given.

        Returns:
            ``out``, uint8 (n, H, W, C).
        """
        rows = np.asarray(indices, np.int64) if np.size(indices) == 0 else np.asarray(indices)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise ValueError(f"indices are {rows.dtype} {rows.shape}; a one-dimensional array of integers is needed")
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise ValueError(f"indices {rows.min()}..{rows.max()} leave the data set of {len(self)} samples")
        shape = (len(rows), *self.shape)
        if out is None:
            out = np.empty(shape, np.uint8)
        elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}; C-contiguous uint8 {shape} is needed")
        # take(mode="clip") writes straight into `out`; mode="raise" would go through a buffer, as would images[rows].
        if len(self._shards) == 1:
            return np.take(self._shards[0].images, rows, axis=0, out=out, mode="clip")
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(owner):
            mine = np.flatnonzero(owner == number)
            out[mine] = np.take(self._shards[number].images, rows[mine] - self._starts[number], axis=0, mode="clip")
        return out

    def verify(self) -> None:
        """Read everything and compare every checksum. Raises ValueError naming the first damaged shard and samples."""
        for shard in self._shards:
            shard.verify()
