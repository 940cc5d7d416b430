"""Reading a user's own HDF5 files of images and labels, as they are."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hvdlocal.communicator.agreement import require_agreement, succeed_together
from hvdlocal.communicator.base import Communicator
from hvdlocal.communicator.single import SingleProcess
from hvdlocal.data.format.extent import READ_BYTES
from hvdlocal.data.format.labels import labels_sha256
from hvdlocal.data.format.manifest import sha256_of_json
from hvdlocal.data.kinds.pixel_statistics import mean_and_std_of_sums
from hvdlocal.data.read.dataset import StoredSamples, regions_of, written_again
from hvdlocal.data.read.foreign_extents import Contiguous
from hvdlocal.data.read.hdf5_inspection import Named, holder_of, refuse_twice
from hvdlocal.data.read.opening import open_each
from hvdlocal.data.read.storage import Layout
from hvdlocal.data.read.user_hdf5_file import CHANNEL_AXES, ChannelAxis, ForeignFile, inspect_file

_MOST_UNNAMED_CLASSES = 1 << 16  # more need names, or at least as many images


def open_hdf5(
    path: str | Path | Sequence[str | Path],
    images: str = "images",
    labels: str = "labels",
    classes: Sequence[str] | None = None,
    *,
    channels: ChannelAxis = "auto",
    storage: Literal["auto", "ram", "mmap", "stream"] = "auto",
    communicator: Communicator | None = None,
    share: Literal["node", "job"] = "node",
    stream_bytes: int | None = None,
) -> HDF5Dataset:
    """Opens images and labels in HDF5 files that somebody else wrote.

    Contiguous images are mapped, staged or streamed as they lie; chunked or compressed ones are unpacked into memory once,
    a run of whole chunks at a time. Then all images are read once, by all ranks in turn, for the fingerprint, mean and
    standard deviation. Such files carry no checksums, so damage goes unnoticed, and their order is the owner's: with
    classes one after the other, use order "global". `ShardWriter` makes shards of them, without both flaws.

    Args:
        path: the file, or several whose samples follow each other.
        images: name of a dataset, uint8 (N, H, W, C), (N, C, H, W) or, for one channel, (N, H, W). It may be a link, or virtual.
        labels: name of a dataset of integers from 0, (N,) or (N, 1), or of one-hot rows (N, classes).
        classes: class names; label i means classes[i]. "0", "1" … unless given.
        channels: which of four axes is that of the channels, "first" (the second axis of all) or "last". "auto" takes the last if
            it is shorter than the second, and the second if it has at most 4 entries and the last has more; other shapes are
            refused.
        storage: see `ShardedDataset`.
        communicator: see `ShardedDataset`.
        share: see `ShardedDataset`.
        stream_bytes: see `ShardedDataset`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no HDF5 file, a dataset is missing or of another type or shape, or the storage is impossible.
            (With a communicator all errors are ValueErrors, the same on every rank.)
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]
    if not paths:
        raise ValueError("no HDF5 file was named; give at least one path")
    if channels not in CHANNEL_AXES:
        raise ValueError(f"channels is {channels!r}; choose 'auto', 'first' or 'last'")
    names = images.strip("/"), labels.strip("/")
    source = _Source(tuple(paths), *names, None if classes is None else tuple(classes), channels)
    return HDF5Dataset(source, communicator or SingleProcess(), storage, share, stream_bytes)


@dataclass(frozen=True)
class _Source:
    """What the user named."""

    paths: tuple[Path, ...]
    images: str
    labels: str
    classes: tuple[str, ...] | None
    channels: ChannelAxis


@dataclass(frozen=True)
class _Statistics:
    """What takes a pass over all images."""

    fingerprint: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


class HDF5Dataset(StoredSamples):
    """Images and labels of a user's own files; made by `open_hdf5`.

    Attributes:
        named: what was found of the images.
    """

    kind = "images"
    shuffled = False

    def __init__(
        self, source: _Source, communicator: Communicator, storage: str, share: str, stream_bytes: int | None
    ) -> None:
        self._load(source, communicator, storage, share, stream_bytes)
        self._open(communicator)
        self._describe_with(_statistics(self, communicator))

    def _load(
        self, source: _Source, communicator: Communicator, storage: str, share: str, stream_bytes: int | None
    ) -> None:
        self._source = source
        self._stamps = {path: _stamp(path) for path in source.paths}  # before they are read: what comes later must show
        facts = {
            "number of files": len(source.paths),
            "images": source.images,
            "labels": source.labels,
            "classes": source.classes,
            "channels": source.channels,
            "storage": storage,
            "share": share,
        }
        require_agreement(communicator, facts, "hvdlocal.data.agreement")
        files = open_each(
            source.paths,
            lambda path: inspect_file(path, source.images, source.labels, source.channels),
            communicator,
        )
        self.named = Named(source.paths, [[file.images for file in files]])
        extents = succeed_together(communicator, lambda: _extents(source, files), "hvdlocal.data.extents")
        others = {path.parent / name for path, file in zip(source.paths, files, strict=True) for name in file.sources}
        self._stamps |= {path: _stamp(path) for path in sorted(others)}
        self._fill = np.repeat(
            np.array([file.images.fill for file in files], np.uint8), [len(file.labels) for file in files]
        )
        labels = np.concatenate([file.labels for file in files])
        self.tables = {"labels": labels, "index": np.arange(len(labels))}
        lowest, highest = int(labels.min()), int(labels.max())
        found = f"{', '.join(map(str, source.paths[:3]))}{' …' if len(source.paths) > 3 else ''}: /{source.labels} holds labels"
        # Labels that are no numbers of classes (hashes, time stamps) would become as many names.
        if source.classes is None and highest >= max(_MOST_UNNAMED_CLASSES, 2 * len(labels)):
            raise ValueError(
                f"{found} up to {highest} for {len(labels)} images: number the classes from 0, or "
                "name them all with classes="
            )
        classes = source.classes or tuple(str(label) for label in range(highest + 1))
        if lowest < 0 or highest >= len(classes):
            raise ValueError(
                f"{found} {lowest}..{highest}, but {len(classes)} classes take labels "
                f"0..{len(classes) - 1}; name all classes, and number them from 0"
            )
        shape = files[0].shape
        self.facts: dict[str, Any] = {"shape": shape, "classes": classes}
        starts = np.cumsum([0] + [len(file.labels) for file in files], dtype=np.int64)
        super().__init__([Layout(extents, math.prod(shape), None, starts)], storage, share, stream_bytes)

    def _describe_with(self, statistics: _Statistics) -> None:
        self._statistics = statistics
        self.facts |= {"mean": statistics.mean, "std": statistics.std}

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of shape, classes, labels and pixels: the same however they are laid out in files."""
        return self._statistics.fingerprint

    def __getstate__(self) -> dict[str, Any]:
        return {
            "source": self._source,
            "settings": self._settings,
            "statistics": self._statistics,
            "stamps": self._stamps,
            "labels": labels_sha256(self.tables["labels"]),
            "regions": regions_of(self._opened),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._load(state["source"], SingleProcess(), *state["settings"])
        mine, theirs = self._stamps, state["stamps"]
        for path in [*mine, *theirs]:
            if path not in mine or path not in theirs or mine[path] != theirs[path]:
                raise written_again(path)
        if labels_sha256(self.tables["labels"]) != state["labels"]:
            raise written_again(self._source.paths[0])
        self._describe_with(state["statistics"])
        self._regions = state["regions"]  # the storage is opened when it is first read


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change, in ns; None for a file that is not there, which is somebody else's to report."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _extents(source: _Source, files: Sequence[ForeignFile]) -> list[Contiguous]:
    """The images of all files, by this rank's paths. Raises ValueError for images that come twice or differ in shape."""
    if len({file.shape for file in files}) > 1:
        usual = Counter(file.shape for file in files).most_common(1)[0][0]
        odd = [
            f"{path} of shape {file.shape}"
            for path, file in zip(source.paths, files, strict=True)
            if file.shape != usual
        ]
        first = next(path for path, file in zip(source.paths, files, strict=True) if file.shape == usual)
        raise ValueError(
            f"one shape is needed for a data set, but images of shape {usual} are in {first}"
            f"{' and others' if len(files) - len(odd) > 1 else ''}, and images in {', '.join(odd[:3])}"
            f"{f' and {len(odd) - 3} more files' if len(odd) > 3 else ''}"
        )
    images = [file.images for file in files]
    refuse_twice(source.paths, images)
    return [
        dataclasses.replace(found.extent, path=holder_of(path, found))
        for path, found in zip(source.paths, images, strict=True)
    ]


def _statistics(dataset: HDF5Dataset, communicator: Communicator) -> _Statistics:
    """Reads all images once, in groups that do not depend on how they are stored; each rank takes every size-th."""
    rank, size = communicator.rank, communicator.size
    shape = dataset.facts["shape"]
    group = max(1, READ_BYTES // math.prod(shape))
    begins = range(0, len(dataset), group)
    mine = [np.arange(begin, min(begin + group, len(dataset))) for begin in begins[rank::size]]

    def read() -> list[_Group]:
        if mine:
            dataset.read_ahead(np.concatenate(mine))
        buffer = np.empty((min(group, len(dataset)), *shape), np.uint8)
        return [_digest(rows[0], dataset.take(rows, out=buffer[: len(rows)]), dataset._fill[rows]) for rows in mine]

    found = communicator.gather(succeed_together(communicator, read, "hvdlocal.data.read"), "hvdlocal.data.statistics")
    groups = [found[number % size][number // size] for number in range(len(begins))]
    blank = [image for group in groups for image in group.blank]
    if blank:
        _tell_of_blank_images(dataset, blank, rank)
    content = {
        "shape": shape,
        "classes": dataset.classes,
        "labels": labels_sha256(dataset.tables["labels"]),
        "images": hashlib.sha256(b"".join(group.sha256 for group in groups)).hexdigest(),
    }
    n = math.prod(shape[:2]) * len(dataset)
    sums = [
        (sum(group.sums[channel][0] for group in groups), sum(group.sums[channel][1] for group in groups))
        for channel in range(shape[2])
    ]
    return _Statistics(sha256_of_json(content), *mean_and_std_of_sums(sums, n))


def _tell_of_blank_images(dataset: HDF5Dataset, blank: list[int], rank: int) -> None:
    """An image of nothing but the fill value may be one that was never written, of which HDF5 keeps no account in a contiguous
    data set. Raises ValueError when there is no other.
    """
    if len(blank) == len(dataset):
        raise ValueError(
            f"the {len(dataset)} images from {dataset.name_of(0)} on hold nothing but the fill value {dataset._fill[0]}: they "
            "were never written, or are no images; write them again"
        )
    if rank == 0:
        warnings.warn(
            f"{len(blank)} of {len(dataset)} images hold nothing but the fill value, the first is {dataset.name_of(blank[0])}: "
            "were they never written?",
            stacklevel=5,
        )


@dataclass(frozen=True)
class _Group:
    """What was found in a run of images: sha256 of the pixels, per channel the sum of the pixel values and of their squares, and
    the numbers of the images that hold nothing but the fill value.
    """

    sha256: bytes
    sums: list[tuple[int, int]]
    blank: list[int]


def _digest(first: int, images: NDArray[np.uint8], fill: NDArray[np.uint8]) -> _Group:
    sums = []
    for channel in range(images.shape[3]):
        pixels = images[..., channel]
        squares = np.square(pixels, dtype=np.uint16)  # 255² fits
        sums.append((int(pixels.sum(dtype=np.uint64)), int(squares.sum(dtype=np.uint64))))
    blank = np.flatnonzero((images.reshape(len(images), -1) == fill[:, None]).all(axis=1))
    return _Group(hashlib.sha256(images.data).digest(), sums, (first + blank).tolist())
