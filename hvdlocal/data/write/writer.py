"""Writing a split of equally sized images, or of JPEG files, as HDF5 shards."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvdlocal.communicator import Communicator, SingleProcess, succeed_together
from hvdlocal.data.format.manifest import MANIFEST_NAME, Manifest, ShardEntry
from hvdlocal.data.format.pixel_statistics import add_pixels
from hvdlocal.data.format.shard import CRC_BLOCK, open_shard, shard_attributes
from hvdlocal.data.write.jpeg_check import check_jpeg, jpeg_libraries, jpeg_versions
from hvdlocal.data.write.shard_writer import write_image_shard, write_jpeg_shard
from hvdlocal.data.write.split_writer import BadSamplesError, SplitWriter
from hvdlocal.data.write.staging import Receipt

__all__ = ["BadSamplesError", "ImageSource", "JpegSample", "JpegShardWriter", "JpegSource", "ShardWriter", "verify"]

_ERRORS_OF_A_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EIO}


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


class ShardWriter(SplitWriter):
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
        attributes = shard_attributes(self.split, self.seed, self.classes)

        def write_shard(path: Path, name: str, rows: NDArray[np.int64]) -> Receipt:
            histogram = np.zeros((channels, 256), np.int64)
            shape = (len(rows), height, width, channels)
            blocks = self._blocks(images, rows, histogram)
            sha256 = write_image_shard(path, blocks, shape, label_array[rows], rows, attributes)
            return Receipt(ShardEntry(name, len(rows), path.stat().st_size, sha256), histogram.tolist())

        return self._write_split(source, (height, width, channels), label_array, write_shard, preparation or {})

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


@dataclass(frozen=True)
class JpegSample:
    """A JPEG file for a shard.

    Attributes:
        data: its content; a grayscale or RGB file, baseline or progressive.
        note: what was done to the original, if anything ("converted from PNG"); the manifest counts equal notes.
    """

    data: bytes
    note: str = ""


class JpegSource(Protocol):
    """N JPEG files, read one at a time, from several threads."""

    def __len__(self) -> int:
        """The number of files, N."""

    def __getitem__(self, index: int, /) -> JpegSample | bytes:
        """File `index`. Raises ValueError with the reason if it cannot be used, OSError if it cannot be read.

        An OSError that is about this file alone (missing, not permitted, unreadable) makes it a bad one; any other ends
        the writing.
        """


class JpegShardWriter(SplitWriter):
    """Writes one split of a data set of JPEG files as HDF5 shards, laid out as by `ShardWriter`.

    The bytes of the files are stored as they are. Every file is decoded once, in full, so that a damaged one is found
    now; the mean and standard deviation in the manifest are those of all decoded pixels, as RGB.

    Args:
        directory: as in `ShardWriter`, like all that is not named here.
        split: name of the split.
        skip_bad: leave out files that cannot be used, instead of refusing the whole once all have been tried.
        threads: decoding threads; by default this rank's share of the cores.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str,
        *,
        skip_bad: bool = False,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(directory, split, **options)
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; there must be at least one")
        self.skip_bad = skip_bad
        self.threads = threads or _own_cores(self._communicator.local_size)

    def write(
        self,
        files: JpegSource,
        labels: ArrayLike,
        *,
        names: Sequence[str] | None = None,
        identity: str | None = None,
        preparation: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Writes the split and returns its manifest; as `ShardWriter.write`, restartable in the same way.

        Args:
            files: N JPEG files; those of one shard are in memory at a time.
            labels: integers (N,) in 0..len(classes)-1.
            names: N strings by which messages call the files.
            identity: what identifies the content of `files`; by default a hash of all of it, for which they are read
                once more.
            preparation: facts that the manifest shall record; the versions of the decoders are added.

        Raises:
            BadSamplesError: some files cannot be used, and `skip_bad` is not set. All have been tried, and
                bad_files.txt lists them.
            ValueError, FileExistsError: as `ShardWriter.write`.
        """

        def check() -> tuple[NDArray[np.int32], str]:
            jpeg_libraries()
            return self._check_labels(labels, len(files), "files"), identity or _sha256_of_files(files)

        label_array, source = succeed_together(self._communicator, check, "data.check")
        attributes = shard_attributes(self.split, self.seed, self.classes)

        def write_shard(path: Path, name: str, rows: NDArray[np.int64]) -> Receipt:
            contents, kept, dims, bad = [], [], [], []
            notes: dict[str, int] = {}
            histogram = np.zeros((3, 256), np.int64)

            def load(row: int) -> tuple[JpegSample, tuple[int, int], NDArray[np.int64]] | str:
                try:
                    sample = _as_sample(files[row])
                    facts = check_jpeg(sample.data)
                except (ValueError, OSError) as error:
                    line = f"{names[row] if names else f'sample {row}'} {_why_bad(error)}"
                    return line.encode(errors="backslashreplace").decode()  # names of files need not be UTF-8
                if facts.lenient and not sample.note:
                    sample = JpegSample(sample.data, "decoded leniently")
                return sample, (facts.height, facts.width), facts.histogram

            for row, loaded in zip(rows.tolist(), self._in_threads(load, rows.tolist()), strict=True):
                self._tell(1)
                if isinstance(loaded, str):
                    bad.append([row, loaded])
                    continue
                sample, size, counts = loaded
                histogram += counts
                contents.append(sample.data)
                kept.append(row)
                dims.append(size)
                if sample.note:
                    notes[sample.note] = notes.get(sample.note, 0) + 1
            if not kept:
                return Receipt(ShardEntry(name, 0, 0, ""), histogram.tolist(), bad, notes)
            index = np.array(kept, np.int64)
            sizes = np.array(dims, np.uint16)
            sha256 = write_jpeg_shard(path, contents, sizes, label_array[index], index, attributes)
            entry = ShardEntry(name, len(index), path.stat().st_size, sha256)
            return Receipt(entry, histogram.tolist(), bad, notes)

        facts = {**(preparation or {}), **jpeg_versions()}
        return self._write_split(source, None, label_array, write_shard, facts, self.skip_bad)

    def _in_threads(self, work: Callable[[int], Any], rows: Sequence[int]) -> Iterator[Any]:
        """The results of `work` for all rows, in their order."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="data-prep")
        try:
            yield from pool.map(work, rows)
        finally:
            pool.shutdown(cancel_futures=True)


def verify(
    directory: str | Path, *, communicator: Communicator | None = None, splits: Sequence[str] | None = None
) -> dict[str, int]:
    """Compares all checksums of finished splits in `directory`; returns the number of samples of each.

    Args:
        directory: of the data set.
        communicator: ranks that share out the work; None for this process alone.
        splits: the splits; by default all that are there.

    Raises:
        FileNotFoundError: there is no finished split, or a shard is missing.
        ValueError: a shard is damaged; the message names the file and, where known, the samples.
    """
    communicator = communicator or SingleProcess()
    rank, size = communicator.rank, communicator.size

    def check() -> dict[str, int]:
        found = {}
        names = splits or sorted(path.parent.name for path in Path(directory).glob(f"*/{MANIFEST_NAME}"))
        for split in names:
            folder = Path(directory) / split
            manifest = Manifest.load(folder / MANIFEST_NAME)
            for entry in manifest.shards[rank::size]:
                open_shard(folder / entry.file, entry, manifest).verify()
            found[split] = manifest.num_samples
        if not found:
            raise FileNotFoundError(f"{directory} holds no finished data set: there is no */{MANIFEST_NAME}")
        return found

    return succeed_together(communicator, check, "data.verify")


def _why_bad(error: ValueError | OSError) -> str:
    """Why a file cannot be used; raises the error again if another file would have met the same one."""
    if isinstance(error, ValueError):
        return str(error)
    if error.errno not in _ERRORS_OF_A_FILE:
        raise error
    return f"cannot be read ({error.strerror})"


def _as_sample(sample: JpegSample | bytes) -> JpegSample:
    return sample if isinstance(sample, JpegSample) else JpegSample(sample)


def _sha256_of_images(images: ImageSource) -> str:
    digest = hashlib.sha256()
    count = images.shape[0]
    step = max(1, (8 << 20) // int(np.prod(images.shape[1:])))
    for start in range(0, count, step):
        rows = np.arange(start, min(start + step, count), dtype=np.int64)
        digest.update(np.ascontiguousarray(images[rows]).data)
    return digest.hexdigest()


def _sha256_of_files(files: JpegSource) -> str:
    digest = hashlib.sha256()
    for index in range(len(files)):
        try:
            content = _as_sample(files[index]).data
        except (ValueError, OSError) as error:
            content = _why_bad(error).encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _own_cores(local_size: int) -> int:
    """Cores that this rank may use, divided among the node's ranks unless the launcher has bound it to some."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // local_size if cores == os.cpu_count() else cores)
