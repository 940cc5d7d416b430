"""Writing a split: validation, pre-shuffle, statistics, and files that appear only when they are whole."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvdlocal.data.dataset import ShardedDataset
from hvdlocal.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, shard_name, split_directory
from hvdlocal.data.order import pre_shuffle
from hvdlocal.data.shard import CRC_BLOCK, open_shard, shard_attributes, write_shard


class ImageSource(Protocol):
    """Images (N, H, W, C) that can be read by an ascending int64 index array: ndarray, memmap, h5py dataset …"""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Must be uint8."""

    def __getitem__(self, rows: NDArray[np.int64], /) -> ArrayLike:
        """The images with the given, ascending indices."""


class ShardWriter:
    """Writes one split of a data set of equally sized images as HDF5 shards.

    The result is ``<directory>/<split>/manifest.json`` beside ``<split>-00000-of-00004.h5`` and so on. The samples are
    shuffled once, on disk, so that any run of neighbours is a fair sample of the classes.

    Args:
        directory: where the data set lives; created if need be.
        split: name of the split, e.g. "train".
        classes: class names; label i means classes[i].
        num_shards: number of files. It has nothing to do with the number of ranks; some 256 MiB to 1 GiB a file is
            good.
        seed: seed of the pre-shuffle.
        overwrite: replace a different data set that is already there.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str,
        *,
        classes: Sequence[str],
        num_shards: int = 1,
        seed: int = 0,
        overwrite: bool = False,
    ) -> None:
        if not classes or isinstance(classes, str) or len(set(classes)) != len(classes):
            raise ValueError(f"classes {classes!r} must be a list of at least one name, each of them once")
        if num_shards < 1:
            raise ValueError(f"num_shards is {num_shards}; there must be at least one shard")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed} is out of range; choose an integer from 0 to 2**63 - 1")
        self.directory = split_directory(directory, split)
        self.split = split
        self.classes = tuple(classes)
        self.num_shards = num_shards
        self.seed = seed
        self.overwrite = overwrite

    def write(self, images: ImageSource, labels: ArrayLike) -> Manifest:
        """Write the split and return its manifest.

        Every shard is written under a temporary name, flushed, read back and compared; only when all are good are
        they renamed, the manifest last. A data set without a manifest is thus an unfinished one, and writing it again
        is the cure. If the same data set is there already, whole, its files are left untouched.

        Args:
            images: uint8 (N, H, W, C), array-like; read lazily, 64 images at a time.
            labels: integers (N,) in 0..len(classes)-1.

        Raises:
            ValueError: images or labels do not fit that description, or N < num_shards.
            FileExistsError: a different data set is there and ``overwrite`` is not set.
        """
        label_array = self._check(images, labels)
        n, shape = images.shape[0], tuple(images.shape[1:])
        existing = self._existing()
        if existing is not None and not self._same_plan(existing, n, shape):
            raise self._refusal()

        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_temporaries()
        try:
            order = pre_shuffle(self.seed, n)
            histogram = np.zeros((shape[2], 256), np.int64)
            bounds = [n * i // self.num_shards for i in range(self.num_shards + 1)]
            shards = tuple(
                self._write_shard(number, images, label_array, order[bounds[number] : bounds[number + 1]], histogram)
                for number in range(self.num_shards)
            )
            mean, std = _mean_and_std(histogram)
            manifest = Manifest(self.split, (shape[0], shape[1], shape[2]), self.classes, self.seed, mean, std, shards)
            if existing is not None and existing.fingerprint != manifest.fingerprint:
                raise self._refusal()
            if existing is not None and self._intact():
                return existing
            self._publish(manifest)
        finally:
            self._remove_temporaries()
        return manifest

    def _check(self, images: ImageSource, labels: ArrayLike) -> NDArray[np.int32]:
        if len(images.shape) != 4 or images.dtype != np.uint8 or 0 in images.shape:
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}; "
                "uint8 (N, height, width, channels) without an empty axis is needed"
            )
        if images.shape[0] < self.num_shards:
            raise ValueError(
                f"{images.shape[0]} images cannot fill {self.num_shards} shards; choose a smaller num_shards"
            )
        array = np.asarray(labels)
        if array.shape != (images.shape[0],) or array.dtype.kind not in "iu":
            raise ValueError(
                f"labels are {array.dtype} {array.shape}; one integer per image, shape ({images.shape[0]},), is needed"
            )
        out_of_range = np.flatnonzero((array < 0) | (array >= len(self.classes)))
        if len(out_of_range):
            first = int(out_of_range[0])
            raise ValueError(
                f"label {array[first]} of sample {first} is out of range; "
                f"{len(self.classes)} classes take labels 0..{len(self.classes) - 1}"
            )
        return array.astype(np.int32)

    def _existing(self) -> Manifest | None:
        """The manifest of the data set that must not be replaced, if there is one."""
        path = self.directory / MANIFEST_NAME
        return None if self.overwrite or not path.exists() else Manifest.load(path)

    def _same_plan(self, manifest: Manifest, n: int, shape: tuple[int, ...]) -> bool:
        # Known before the work, so that hours of it are not spent on a refusal.
        return (manifest.num_samples, manifest.shape, manifest.classes, manifest.seed, len(manifest.shards)) == (
            n,
            shape,
            self.classes,
            self.seed,
            self.num_shards,
        )

    def _refusal(self) -> FileExistsError:
        return FileExistsError(
            f"{self.directory} already holds a different data set; choose another directory, or overwrite"
        )

    def _intact(self) -> bool:
        try:
            ShardedDataset(self.directory.parent, self.split).verify()
        except (ValueError, OSError):
            return False
        return True

    def _write_shard(
        self,
        number: int,
        images: ImageSource,
        labels: NDArray[np.int32],
        rows: NDArray[np.int64],
        histogram: NDArray[np.int64],
    ) -> ShardEntry:
        """Write and read back one shard under its temporary name; add its pixels to the histogram (C, 256)."""
        name = shard_name(self.split, number, self.num_shards)
        temporary = self.directory / f"{name}.tmp"
        shape = (len(rows), images.shape[1], images.shape[2], images.shape[3])
        attributes = shard_attributes(self.split, self.seed, self.classes)
        sha256 = write_shard(temporary, _blocks(images, rows, histogram), shape, labels[rows], rows, attributes)
        shard = open_shard(temporary, shape, attributes)
        shard.verify()
        if shard.sha256 != sha256:
            raise OSError(f"{temporary} does not read back as it was written; check the file system and its free space")
        return ShardEntry(name, len(rows), temporary.stat().st_size, sha256)

    def _publish(self, manifest: Manifest) -> None:
        # The old manifest goes first: from then on until the new one is there, a reader finds no data set instead of
        # a mixed one.
        (self.directory / MANIFEST_NAME).unlink(missing_ok=True)
        _fsync(self.directory)
        for shard in manifest.shards:
            os.replace(self.directory / f"{shard.file}.tmp", self.directory / shard.file)
        _fsync(self.directory)
        temporary = self.directory / f"{MANIFEST_NAME}.tmp"
        manifest.save(temporary)
        _fsync(temporary)
        os.replace(temporary, self.directory / MANIFEST_NAME)
        _fsync(self.directory)
        # What is left of a data set with another number of shards would never be read again.
        for leftover in set(self.directory.glob(f"{self.split}-?????-of-?????.h5")) - {
            self.directory / s.file for s in manifest.shards
        }:
            leftover.unlink()

    def _remove_temporaries(self) -> None:
        for path in [*self.directory.glob(f"{self.split}-*.h5.tmp"), self.directory / f"{MANIFEST_NAME}.tmp"]:
            path.unlink(missing_ok=True)


def verify(directory: str | Path) -> dict[str, int]:
    """Compare all checksums of all finished splits in ``directory``; returns the number of samples of each.

    Raises:
        FileNotFoundError: there is no finished split, or a shard is missing.
        ValueError: a shard is damaged; the message names the file and, where known, the samples.
    """
    found = {}
    for manifest in sorted(Path(directory).glob(f"*/{MANIFEST_NAME}")):
        dataset = ShardedDataset(directory, manifest.parent.name)
        dataset.verify()
        found[manifest.parent.name] = len(dataset)
    if not found:
        raise FileNotFoundError(f"{directory} holds no finished data set: there is no */{MANIFEST_NAME}")
    return found


def _blocks(images: ImageSource, rows: NDArray[np.int64], histogram: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    """The images of the given rows in blocks of CRC_BLOCK, counted into the histogram (C, 256) on their way."""
    for start in range(0, len(rows), CRC_BLOCK):
        wanted = rows[start : start + CRC_BLOCK]
        ascending = np.argsort(wanted)  # h5py and files read by ascending index only, or best
        block = np.empty((len(wanted), *images.shape[1:]), np.uint8)
        block[ascending] = images[wanted[ascending]]
        for channel, counts in enumerate(histogram):
            counts += np.bincount(block[..., channel].ravel(), minlength=256)
        yield block


def _mean_and_std(histogram: NDArray[np.int64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of pixel / 255 per channel, from exact integer sums."""
    mean, std = [], []
    for counts in histogram.tolist():
        n = sum(counts)
        total = sum(value * count for value, count in enumerate(counts))
        squares = sum(value * value * count for value, count in enumerate(counts))
        mean.append(total / (255 * n))
        std.append(math.sqrt(n * squares - total * total) / (255 * n))
    return tuple(mean), tuple(std)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
