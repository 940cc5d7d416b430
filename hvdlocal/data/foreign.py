"""Reading a user's own HDF5 files of images and labels, as they are."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from hvdlocal.communicator.agreement import require_agreement, succeed_together
from hvdlocal.communicator.base import Communicator
from hvdlocal.data.dataset import StoredSamples, open_each, region_of, written_again
from hvdlocal.data.manifest import sha256_of_json
from hvdlocal.data.storage import Layout, Reader
from hvdlocal.data.storage.base import BLOCK_BYTES, READ_BYTES

_MOST_UNNAMED_CLASSES = 1 << 16  # more need names, or at least as many images


def open_hdf5(
    path: str | Path | Sequence[str | Path],
    images: str = "images",
    labels: str = "labels",
    classes: Sequence[str] | None = None,
    *,
    storage: Literal["auto", "ram", "mmap", "stream"] = "auto",
    communicator: Communicator | None = None,
    share: Literal["node", "job"] = "node",
    stream_bytes: int | None = None,
) -> HDF5Dataset:
    """Open images and labels in HDF5 files that somebody else wrote.

    Contiguous images are mapped, staged or streamed as they lie; chunked or compressed ones are unpacked into memory once,
    a run of whole chunks at a time. Then all images are read once, by all ranks in turn, for the fingerprint, mean and
    standard deviation. Such files carry no checksums, so damage goes unnoticed, and their order is the owner's: with
    classes one after the other, use order "global". `ShardWriter` makes shards of them, without both flaws.

    Args:
        path: the file, or several whose samples follow each other.
        images: name of a dataset, uint8 (N, H, W, C) or, for one channel, (N, H, W).
        labels: name of a dataset of integers, (N,) or (N, 1), from 0.
        classes: class names; label i means classes[i]. "0", "1" … unless given.
        storage, communicator, share, stream_bytes: see `ShardedDataset`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no HDF5 file, a dataset is missing or of another type or shape, or the storage is impossible.
            (With a communicator all errors are ValueErrors, the same on every rank.)
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]
    if not paths:
        raise ValueError("no HDF5 file was named; give at least one path")
    source = _Source(tuple(paths), images, labels, None if classes is None else tuple(classes))
    return HDF5Dataset(source, communicator, storage, share, stream_bytes)


@dataclass(frozen=True)
class _Source:
    """What the user named."""

    paths: tuple[Path, ...]
    images: str
    labels: str
    classes: tuple[str, ...] | None


@dataclass(frozen=True)
class _Statistics:
    """What takes a pass over all images."""

    fingerprint: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


class HDF5Dataset(StoredSamples):
    """Images and labels of a user's own files; made by `open_hdf5`."""

    kind = "images"
    shuffled = False

    def __init__(
        self, source: _Source, communicator: Communicator | None, storage: str, share: str, stream_bytes: int | None
    ) -> None:
        self._load(source, communicator, storage, share, stream_bytes)
        self._open(communicator)
        self._statistics = _statistics(self, communicator)

    def _load(
        self, source: _Source, communicator: Communicator | None, storage: str, share: str, stream_bytes: int | None
    ) -> None:
        self._source = source
        self._stamps = [_stamp(path) for path in source.paths]  # before they are read: what comes later must show
        if communicator is not None:
            facts = {"number of files": len(source.paths), "storage": storage, "share": share}
            require_agreement(communicator, facts, "hvdlocal.data.agreement")
        files = open_each(source.paths, partial(_open_file, source=source), communicator)
        shapes = sorted({file.shape for file in files})
        if len(shapes) > 1:
            raise ValueError(
                f"{source.paths[0]} and the others hold images of shapes {shapes}; one shape is needed for a data set"
            )
        self._shape = shapes[0]
        self.labels = np.concatenate([file.labels for file in files])
        self.index = np.arange(len(self.labels))
        self.dims = None
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        found = f"{', '.join(map(str, source.paths[:3]))}{' …' if len(source.paths) > 3 else ''}: /{source.labels} holds labels"
        # Labels that are no numbers of classes (hashes, time stamps) would become as many names.
        if source.classes is None and highest >= max(_MOST_UNNAMED_CLASSES, 2 * len(self.labels)):
            raise ValueError(
                f"{found} up to {highest} for {len(self.labels)} images: number the classes from 0, or "
                "name them all with classes="
            )
        self._classes = source.classes or tuple(str(label) for label in range(highest + 1))
        if lowest < 0 or highest >= len(self._classes):
            raise ValueError(
                f"{found} {lowest}..{highest}, but {len(self._classes)} classes take labels "
                f"0..{len(self._classes) - 1}; name all classes, and number them from 0"
            )
        extents = [dataclasses.replace(file.extent, path=path) for file, path in zip(files, source.paths, strict=True)]
        starts = np.cumsum([0] + [len(file.labels) for file in files], dtype=np.int64)
        super().__init__(Layout(extents, math.prod(self._shape), None, starts), storage, share, stream_bytes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        return self._shape

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label i means classes[i]."""
        return self._classes

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of pixel / 255 over all images, per channel."""
        return self._statistics.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Population standard deviation of pixel / 255 over all images, per channel."""
        return self._statistics.std

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
            "labels": _sha256(self.labels),
            "region": region_of(self._opened),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._load(state["source"], None, *state["settings"])
        for path, mine, theirs in zip(self._source.paths, self._stamps, state["stamps"], strict=True):
            if mine != theirs:
                raise written_again(path)
        if _sha256(self.labels) != state["labels"]:
            raise written_again(self._source.paths[0])
        self._statistics = state["statistics"]
        self._region = state["region"]  # the storage is opened when it is first read


@dataclass(frozen=True, eq=False)
class _Contiguous:
    """An `Extent`: images that lie in the file as they are. There are no checksums; the units say where it may be cut."""

    path: Path
    data_offset: int
    data_bytes: int
    unit_bounds: NDArray[np.int64]

    def check_unit(self, unit: int, data: Any) -> None:
        """Knows nothing to check."""


@dataclass(frozen=True, eq=False)
class _Packed(_Contiguous):
    """An `Unmappable` extent: images that HDF5 must unpack. A unit is a run of whole chunks; `data_offset` means nothing."""

    name: str

    def open_reader(self) -> Reader:
        """See `Unmappable`."""
        return _Unpacker(self)


class _Unpacker:
    """A `Reader` through HDF5."""

    def __init__(self, extent: _Packed) -> None:
        self._extent = extent
        self._file = _open_hdf5(extent.path)
        self._images = self._file[extent.name]

    def read(self, first: int, last: int, into: memoryview) -> None:
        """See `Reader`. One call of HDF5 per unit, and so no chunk is unpacked twice."""
        shape = self._images.shape[1:]
        images = np.frombuffer(into, np.uint8).reshape(-1, *shape)
        rows = (self._extent.unit_bounds[first : last + 1] // math.prod(shape)).tolist()
        for start, stop in pairwise(rows):
            try:
                self._images.read_direct(images[start - rows[0] : stop - rows[0]], np.s_[start:stop])
            except OSError as error:
                raise ValueError(
                    f"{self._extent.path}: images {start}..{stop - 1} of /{self._extent.name} cannot be read ({error}); "
                    "copy the file again"
                ) from error

    def close(self) -> None:
        """See `Reader`."""
        self._file.close()


@dataclass(frozen=True)
class _File:
    """What was found in one file."""

    extent: _Contiguous
    shape: tuple[int, int, int]
    labels: NDArray[np.int32]


# What h5py raises, beside ValueError, for a file whose inside is not what it should be.
_DAMAGE = (OSError, KeyError, RuntimeError, TypeError, MemoryError)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change, in ns; None for a file that is not there, which is somebody else's to report."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _open_hdf5(path: Path) -> h5py.File:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name an HDF5 file of images and labels")
    try:
        return h5py.File(path, "r", locking=False)
    except _DAMAGE as error:
        raise ValueError(f"{path} cannot be opened as HDF5 ({error}); copy or write it again") from error


def _open_file(path: Path, source: _Source) -> _File:
    with _open_hdf5(path) as file:
        try:
            return _inspect(path, file, source)
        except _DAMAGE as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"{path} is damaged: HDF5 says {reason}; copy it again") from error


def _inspect(path: Path, file: h5py.File, source: _Source) -> _File:
    images = _dataset(path, file, source.images)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"{path} holds /{source.images} as {images.dtype} {images.shape}; uint8 (N, H, W, C) or (N, H, W) with at "
            "least one image is needed: convert it, or name another dataset"
        )
    _require_written(path, images)
    height, width, channels = (*images.shape[1:], 1)[:3]
    labels = _labels(path, _dataset(path, file, source.labels), len(images))
    return _File(_extent(path, images, source.images), (height, width, channels), labels)


def _require_written(path: Path, dataset: h5py.Dataset) -> None:
    """Raises ValueError for data that were never written: HDF5 would read them as zeros and say nothing."""
    layout = dataset.id.get_create_plist().get_layout()
    if layout == h5py.h5d.CHUNKED:
        expected = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        found = dataset.id.get_num_chunks()
        if found < expected:
            raise ValueError(
                f"{path} holds {found} of the {expected} chunks of {dataset.name}: the others were never written; write "
                "them, or copy the file again"
            )
    elif layout == h5py.h5d.VIRTUAL:
        for source in dataset.virtual_sources():
            _require_source(path, dataset, source.file_name, source.dset_name)
    # The size is the test: with a user block, get_offset() of data never written is (user block - 1), not None.
    elif layout == h5py.h5d.CONTIGUOUS and dataset.id.get_storage_size() != dataset.size * dataset.dtype.itemsize:
        raise ValueError(f"{path} holds no data in {dataset.name}: they were never written")


def _require_source(path: Path, dataset: h5py.Dataset, file_name: str, name: str) -> None:
    """The same for one of the datasets that a virtual one is made of."""
    if file_name == ".":  # a dataset of the same file
        _require_written(path, _dataset(path, dataset.file, name))
        return
    places = [path.parent / file_name, Path(file_name)]  # where HDF5 looks
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(
            f"{path} takes {dataset.name} from {file_name}, which does not exist: copy it too, or write all into one file"
        )
    with _open_hdf5(found) as file:
        _require_written(found, _dataset(found, file, name))


def _dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        found: list[str] = []
        file.visititems(lambda key, item: found.append(key) if isinstance(item, h5py.Dataset) else None)
        raise ValueError(f"{path} has no dataset /{name}; it has {', '.join(sorted(found)[:20]) or 'none'}")
    return dataset


def _labels(path: Path, dataset: h5py.Dataset, count: int) -> NDArray[np.int32]:
    if dataset.dtype.kind not in "iu" or dataset.shape not in ((count,), (count, 1)):
        raise ValueError(
            f"{path} holds {dataset.name} as {dataset.dtype} {dataset.shape}; integers, one for each of the {count} images, "
            "are needed"
        )
    _require_written(path, dataset)
    labels = np.asarray(dataset[:]).reshape(count)
    if labels.min() < 0 or labels.max() >= 2**31:
        raise ValueError(
            f"{path} holds labels {labels.min()}..{labels.max()} in {dataset.name}; number the classes from 0"
        )
    return labels.astype(np.int32)


def _extent(path: Path, images: h5py.Dataset, name: str) -> _Contiguous:
    row_bytes = math.prod(images.shape[1:])
    data_bytes = len(images) * row_bytes
    properties = images.id.get_create_plist()
    if properties.get_layout() == h5py.h5d.CONTIGUOUS and not properties.get_external_count():
        return _Contiguous(
            path, int(images.id.get_offset()), data_bytes, _unit_bounds(len(images), row_bytes, 1, BLOCK_BYTES)
        )
    chunk = images.chunks[0] if images.chunks else 1
    return _Packed(path, 0, data_bytes, _unit_bounds(len(images), row_bytes, chunk, READ_BYTES), name)


def _unit_bounds(rows: int, row_bytes: int, multiple: int, least_bytes: int) -> NDArray[np.int64]:
    step = multiple * -(-least_bytes // (multiple * row_bytes))
    return np.append(np.arange(0, rows, step, dtype=np.int64), rows) * row_bytes


def _statistics(dataset: HDF5Dataset, communicator: Communicator | None) -> _Statistics:
    """Reads all images once, in groups that do not depend on how they are stored; each rank takes every size-th."""
    rank, size = (0, 1) if communicator is None else (communicator.rank, communicator.size)
    group = max(1, READ_BYTES // math.prod(dataset.shape))
    begins = range(0, len(dataset), group)
    mine = [np.arange(begin, min(begin + group, len(dataset))) for begin in begins[rank::size]]

    def read() -> list[tuple[bytes, list[tuple[int, int]]]]:
        if mine:
            dataset.read_ahead(np.concatenate(mine))
        buffer = np.empty((min(group, len(dataset)), *dataset.shape), np.uint8)
        return [_digest(dataset.take(rows, out=buffer[: len(rows)])) for rows in mine]

    if communicator is None:
        found = [read()]
    else:
        found = communicator.gather(
            succeed_together(communicator, read, "hvdlocal.data.read"), "hvdlocal.data.statistics"
        )
    groups = [found[number % size][number // size] for number in range(len(begins))]
    content = {
        "shape": dataset.shape,
        "classes": dataset.classes,
        "labels": _sha256(dataset.labels),
        "images": hashlib.sha256(b"".join(digest for digest, _ in groups)).hexdigest(),
    }
    n = math.prod(dataset.shape[:2]) * len(dataset)
    mean, std = [], []
    for channel in range(dataset.shape[2]):
        total = sum(sums[channel][0] for _, sums in groups)
        squares = sum(sums[channel][1] for _, sums in groups)
        mean.append(total / (255 * n))
        std.append(math.sqrt(n * squares - total * total) / (255 * n))
    return _Statistics(sha256_of_json(content), tuple(mean), tuple(std))


def _sha256(labels: NDArray[np.int32]) -> str:
    return hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest()


def _digest(images: NDArray[np.uint8]) -> tuple[bytes, list[tuple[int, int]]]:
    """sha256 of the pixels, and per channel the sum of the pixel values and of their squares."""
    sums = []
    for channel in range(images.shape[3]):
        pixels = images[..., channel]
        squares = np.square(pixels, dtype=np.uint16)  # 255² fits
        sums.append((int(pixels.sum(dtype=np.uint64)), int(squares.sum(dtype=np.uint64))))
    return hashlib.sha256(images.data).digest(), sums
