"""One HDF5 file that somebody else wrote: what its images and labels are, and where their bytes really lie.

A name in a file may stand for data that lie elsewhere: behind a link, in raw files, or put together from several data sets. So
everything that is asked of a data set is asked of the file that holds it (`Dataset.file`), and what nobody wrote, which HDF5
reads as zeros without an error, is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.format.extent import READ_BYTES, Reader
from hvdlocal.data.format.hdf5 import is_stored, open_for_reading
from hvdlocal.data.format.labels import class_numbers, no_class_numbers
from hvdlocal.data.read.storage.base import BLOCK_BYTES

ChannelAxis = Literal["auto", "first", "last"]
CHANNEL_AXES = ("auto", "first", "last")

_MOST_USUAL_CHANNELS = 4
_COPY = "copy it again"


@dataclass(frozen=True, eq=False)
class Contiguous:
    """An `Extent`: images that lie in a file as they are. There are no checksums; the units say where it may be cut."""

    path: Path
    data_offset: int
    data_bytes: int
    unit_bounds: NDArray[np.int64]

    def check_unit(self, unit: int, data: Any) -> None:
        """Does nothing, as there are no checksums."""


@dataclass(frozen=True, eq=False)
class Packed(Contiguous):
    """An `Unmappable` extent: images that HDF5 must put together. `data_offset` means nothing.

    Attributes:
        name: of the data set, in the file `path`.
        obstacle: see `Unmappable`.
        channels_first: whether its images are (C, H, W).
    """

    name: str
    obstacle: str
    channels_first: bool

    def open_reader(self) -> Reader:
        """See `Unmappable`."""
        return _Unpacker(self)


class _Unpacker:
    """A `Reader` through HDF5. A unit is a run of whole chunks, so no chunk is unpacked twice."""

    def __init__(self, extent: Packed) -> None:
        self._extent = extent
        self._file = open_for_reading(extent.path, _COPY)
        self._images = self._file[extent.name]

    def read(self, first: int, last: int, into: memoryview) -> None:
        """See `Reader`. One call of HDF5 per unit."""
        shape = self._images.shape[1:]
        rows = (self._extent.unit_bounds[first : last + 1] // math.prod(shape)).tolist()
        images = np.frombuffer(into, np.uint8).reshape(rows[-1] - rows[0], -1)
        for start, stop in pairwise(rows):
            part = images[start - rows[0] : stop - rows[0]]
            try:
                if self._extent.channels_first:
                    planes = self._images[start:stop]
                    part.reshape(len(part), *shape[1:], shape[0])[:] = np.moveaxis(planes, 1, 3)
                else:
                    self._images.read_direct(part.reshape(len(part), *shape), np.s_[start:stop])
            except OSError as error:
                raise ValueError(
                    f"{self._extent.path}: images {start}..{stop - 1} of /{self._extent.name} cannot be read ({error}); "
                    "copy the file again"
                ) from error

    def close(self) -> None:
        """See `Reader`."""
        self._file.close()


@dataclass(frozen=True)
class ForeignFile:
    """What was found in one file.

    Attributes:
        extent: the images; its path is the named file's, also where `holder` says otherwise.
        shape: (height, width, channels) of each.
        labels: int32 (n,).
        address: of the images, in the file that holds them; by it a data set is known that is reached in two ways.
        fill: the pixel value that HDF5 gives where nothing was written.
        holder: that file, if it is not the named one: an absolute path, or one from the directory of the named file.
        sources: all other files that images or labels come from, as `holder`.
        parts: (file as `holder`, address) of the data sets that virtual images are put together from.
    """

    extent: Contiguous
    shape: tuple[int, int, int]
    labels: NDArray[np.int32]
    address: int
    fill: int
    holder: str | None = None
    sources: tuple[str, ...] = ()
    parts: tuple[tuple[str, int], ...] = ()


def inspect_file(path: Path, images: str, labels: str, channels: ChannelAxis) -> ForeignFile:
    """Finds out where images and labels lie, and reads the labels.

    Args:
        path: the file.
        images, labels: names of data sets in it.
        channels: which axis of four holds the channels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be used; the message names it and mostly the remedy.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name the HDF5 files in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name an HDF5 file of images and labels")
    with open_for_reading(path, "copy or write it again") as file:
        try:
            return _Inspection(path, file).whole(images, labels, channels)
        except RecursionError as error:
            raise ValueError(
                f"{path} holds a virtual data set that takes its data from itself; write it again"
            ) from error
        except (OSError, KeyError, RuntimeError, TypeError, MemoryError) as error:
            # What h5py raises, beside ValueError, for a file whose inside is not what it should be.
            reason = str(error) or type(error).__name__
            raise ValueError(f"{path} is damaged: HDF5 says {reason}; {_COPY}") from error


class _Inspection:
    """Looking at one named file, and at every other that its data come from."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self._path = path
        self._file = file
        self._sources: set[str] = set()
        self._parts: set[tuple[str, int]] = set()

    def whole(self, images_name: str, labels_name: str, channels: ChannelAxis) -> ForeignFile:
        images = self._dataset(self._file, images_name)
        if images.dtype != np.uint8 or images.shape is None or images.ndim not in (3, 4) or 0 in images.shape:
            raise ValueError(
                f"{self._path} holds /{images_name} as {_kind(images)} {images.shape}; uint8 (N, H, W, C) or (N, H, W) with at "
                "least one image is needed: convert it, or name another dataset"
            )
        shape, channels_first = self._image_shape(images, images_name, channels)
        self._require_written(images)
        parts = tuple(sorted(self._parts))
        labels = self._labels(self._dataset(self._file, labels_name), len(images))
        extent = self._extent(images, images_name, channels_first)
        holder = self._elsewhere(images)
        return ForeignFile(
            extent,
            shape,
            labels,
            h5py.h5o.get_info(images.id).addr,
            int(images.fillvalue),
            None if isinstance(extent, Packed) else holder,
            tuple(sorted(self._sources)),
            parts,
        )

    def _image_shape(self, images: h5py.Dataset, name: str, channels: ChannelAxis) -> tuple[tuple[int, int, int], bool]:
        """(height, width, channels), and whether the file has the channels first."""
        if images.ndim == 3:
            return (*images.shape[1:], 1), False
        _, second, third, last = images.shape
        if channels == "auto" and last < second:
            channels = "last"
        elif channels == "auto" and second <= _MOST_USUAL_CHANNELS < last:
            channels = "first"
        if channels == "auto":
            raise ValueError(
                f"{self._path} holds /{name} of shape {images.shape}, which does not tell whether the channels are the second "
                "axis or the last: say channels='first' or channels='last'"
            )
        if channels == "last":
            return (second, third, last), False
        return (third, last, second), second > 1  # one channel lies in the file as if it were last

    def _labels(self, dataset: h5py.Dataset, count: int) -> NDArray[np.int32]:
        where = self._where(dataset)
        if (
            dataset.shape is None
            or dataset.shape[:1] != (count,)
            or dataset.ndim > 2
            or dataset.dtype.kind not in "iufb"
        ):
            why = no_class_numbers(dataset.dtype, dataset.shape, count)
            raise ValueError(f"{where} holds {dataset.name} as {why}")
        self._require_written(dataset)
        try:
            labels = class_numbers(np.asarray(dataset[:]), count)
        except ValueError as error:
            raise ValueError(f"{where} holds {dataset.name} as {error}") from None
        if labels.min() < 0 or labels.max() >= 2**31:
            raise ValueError(
                f"{where} holds labels {labels.min()}..{labels.max()} in {dataset.name}; number the classes from 0"
            )
        return labels.astype(np.int32)

    def _extent(self, images: h5py.Dataset, name: str, channels_first: bool) -> Contiguous:
        row_bytes = math.prod(images.shape[1:])
        data_bytes = len(images) * row_bytes
        properties = images.id.get_create_plist()
        layout, stored = properties.get_layout(), images.id.get_type()
        plain = stored.equal(h5py.h5t.STD_U8LE) or stored.equal(h5py.h5t.STD_U8BE)
        if channels_first:
            obstacle = "channels-first"
        elif layout == h5py.h5d.VIRTUAL:
            obstacle = "virtual, put together from other data sets"
        elif properties.get_external_count():
            obstacle = "in raw files beside the HDF5 file"
        elif layout == h5py.h5d.CHUNKED:
            obstacle = "chunked or compressed"
        elif layout != h5py.h5d.CONTIGUOUS:
            obstacle = "in the header of the file (compact)"
        elif not plain:
            obstacle = "of a type with unused bits"
        else:
            bounds = _unit_bounds(len(images), row_bytes, 1, BLOCK_BYTES)
            return Contiguous(self._path, int(images.id.get_offset()), data_bytes, bounds)
        bounds = _unit_bounds(len(images), row_bytes, images.chunks[0] if images.chunks else 1, READ_BYTES)
        return Packed(self._path, 0, data_bytes, bounds, name, obstacle, channels_first)

    # -- what was never written ---------------------------------------------------------------------------------------

    def _require_written(self, dataset: h5py.Dataset) -> None:
        """Raises ValueError for data that were never written: HDF5 would read them as zeros without an error."""
        self._elsewhere(dataset)
        where, properties = self._where(dataset), dataset.id.get_create_plist()
        layout = properties.get_layout()
        if layout == h5py.h5d.CHUNKED:
            _require_filters(where, dataset)
            expected = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
            found = dataset.id.get_num_chunks()
            if found < expected:
                raise ValueError(
                    f"{where} holds {found} of the {expected} chunks of {dataset.name}: the others were never written; "
                    "write them, or copy the file again"
                )
        elif layout == h5py.h5d.VIRTUAL:
            self._require_covered(dataset)
        elif properties.get_external_count():
            self._require_raw_files(dataset)
        elif layout == h5py.h5d.CONTIGUOUS and not is_stored(dataset):
            raise ValueError(f"{where} holds no data in {dataset.name}: they were never written")

    def _require_raw_files(self, dataset: h5py.Dataset) -> None:
        """The same for data that lie in raw files: a file that is too short reads as zeros."""
        where, left = self._where(dataset), dataset.size * dataset.dtype.itemsize
        for name, offset, size in dataset.external:
            raw, share = _raw_file(name), min(size, left)
            found = raw.stat().st_size if raw.is_file() else None
            if found is None or found < offset + share:
                what = "does not exist" if found is None else f"has {found} bytes where {offset + share} are needed"
                raise ValueError(
                    f"{where} takes {dataset.name} from the raw file {raw}, which {what}: copy it again; a relative name is "
                    "looked up in the directory where the program was started"
                )
            self._sources.add(str(raw.absolute()))
            left -= share
        if left:
            raise ValueError(f"{where} names no raw file for the last {left} bytes of {dataset.name}: write it again")

    def _require_covered(self, dataset: h5py.Dataset) -> None:
        """The same for a virtual data set: each image comes from a source, and every source is there."""
        where, shape = self._where(dataset), dataset.shape
        missing = h5py.h5s.create_simple(shape)
        _cut(missing, (0,) * len(shape), [size - 1 for size in shape], h5py.h5s.SELECT_SET)
        for source in dataset.virtual_sources():
            if source.vspace.get_select_type() == h5py.h5s.SEL_ALL:
                missing.select_none()
            elif source.vspace.is_regular_hyperslab() and h5py.h5s.UNLIMITED in np.ravel(
                source.vspace.get_regular_hyperslab()
            ):
                raise ValueError(
                    f"{where} takes {dataset.name} from {source.file_name} without a fixed end, so that nobody can tell whether "
                    "all of it is there: write a virtual data set of fixed size, or write the images into one file"
                )
            else:
                for first, final in source.vspace.get_select_hyper_blocklist():
                    _cut(missing, first, final, h5py.h5s.SELECT_NOTB)
            self._require_source(dataset, source)
        if missing.get_select_npoints():
            first, final = missing.get_select_bounds()
            raise ValueError(
                f"{where} has no source for all of {dataset.name}[{first[0]}:{final[0] + 1}], which would be read as "
                f"{dataset.fillvalue}: add the missing part, or write all into one file"
            )

    def _require_source(self, dataset: h5py.Dataset, source: Any) -> None:
        where = self._where(dataset)
        if source.file_name == ".":  # a dataset of the same file
            self._require_part(dataset, source, dataset.file)
            return
        found = next((place for place in _places(dataset.file.filename, source.file_name) if place.is_file()), None)
        if found is None:
            raise ValueError(
                f"{where} takes {dataset.name} from {source.file_name}, which does not exist: copy it too, or write all "
                "into one file"
            )
        with open_for_reading(found, _COPY) as file:
            self._require_part(dataset, source, file)

    def _require_part(self, dataset: h5py.Dataset, source: Any, file: h5py.File) -> None:
        part = self._dataset(file, source.dset_name)
        if part.dtype != dataset.dtype:
            raise ValueError(
                f"{self._where(dataset)} has {dataset.name} as {dataset.dtype}, but takes it from {_kind(part)} in "
                f"{self._where(part)}: HDF5 would cut the values off; convert them"
            )
        if source.src_space.get_select_type() == h5py.h5s.SEL_HYPERSLABS:
            _, final = source.src_space.get_select_bounds()
            if len(final) != part.ndim or any(stop >= size for stop, size in zip(final, part.shape, strict=True)):
                raise ValueError(
                    f"{self._where(part)} holds {part.name} of shape {part.shape}, but {self._where(dataset)} takes a part of "
                    f"it that ends at {tuple(stop + 1 for stop in final)}: copy both again"
                )
        elif part.size < source.vspace.get_select_npoints():
            raise ValueError(
                f"{self._where(part)} holds {part.name} of shape {part.shape}, less than {self._where(dataset)} takes from it: "
                "copy both again"
            )
        self._require_written(part)
        self._parts.add((self._elsewhere(part) or self._path.name, h5py.h5o.get_info(part.id).addr))

    # -- names --------------------------------------------------------------------------------------------------------

    def _dataset(self, file: h5py.File, name: str) -> h5py.Dataset:
        found = file.get(name)
        where = self._path if file is self._file else file.filename
        if isinstance(found, h5py.Dataset):
            return found
        link = None if found is not None else file.get(name, getlink=True)
        if isinstance(link, h5py.SoftLink | h5py.ExternalLink):
            other = f" of {link.filename}" if isinstance(link, h5py.ExternalLink) else ""
            raise ValueError(
                f"{where} has a link /{name} to {link.path}{other}, where no data set can be opened: copy it too"
            )
        if isinstance(found, h5py.Group):
            inside = ", ".join(sorted(found)[:20]) or "nothing"
            raise ValueError(f"{where} has a group /{name}, which holds {inside}: name a data set in it")
        datasets: list[str] = []
        file.visititems(lambda key, item: datasets.append(key) if isinstance(item, h5py.Dataset) else None)
        raise ValueError(f"{where} has no dataset /{name}; it has {', '.join(sorted(datasets)[:20]) or 'none'}")

    def _where(self, dataset: h5py.Dataset) -> Path | str:
        """The file that holds a data set, by the user's name for it if it is the named one."""
        holder: str = dataset.file.filename
        return self._path if holder == self._file.filename else holder

    def _elsewhere(self, dataset: h5py.Dataset) -> str | None:
        """The file that holds a data set if it is not the named one; noted as a source."""
        holder: str = dataset.file.filename
        if holder == self._file.filename:
            return None
        holder = os.path.join(os.getcwd(), holder)  # HDF5 looks there too, and then its name is relative
        # Other nodes may have the named file, and what lies with it, in another directory.
        holder = holder.removeprefix(f"{Path(self._file.filename).parent}/")
        self._sources.add(holder)
        return holder


def _kind(dataset: h5py.Dataset) -> str:
    """The type of a data set, for a message."""
    if h5py.check_ref_dtype(dataset.dtype) is not None:
        return "references"
    if h5py.check_vlen_dtype(dataset.dtype) is not None:
        return "arrays of various lengths (JPEGs, perhaps, which `python -m data_prep imagenet` takes as files)"
    return str(dataset.dtype)


def _require_filters(where: Path | str, dataset: h5py.Dataset) -> None:
    properties = dataset.id.get_create_plist()
    for number in range(properties.get_nfilters()):
        code, _, _, name = properties.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            raise ValueError(
                f"{where} holds {dataset.name} compressed by filter {code} ({name.decode(errors='replace')}), which this HDF5 "
                "has not got: import hdf5plugin before (pip install hdf5plugin), or rewrite the file with `h5repack -f NONE`"
            )


def _cut(space: h5py.h5s.SpaceID, first: Any, final: Any, how: int) -> None:
    """Combines the selection of a space with the block from index `first` to index `final`, both included."""
    start = tuple(int(index) for index in first)
    block = tuple(int(stop) - begin + 1 for begin, stop in zip(start, final, strict=True))
    space.select_hyperslab(start, (1,) * len(start), block=block, op=how)


def _places(holder: str, name: str) -> Iterator[Path]:
    """Where HDF5 looks for the file of a virtual data set's source, in its order."""
    if os.path.isabs(name):
        yield Path(name)
        name = os.path.basename(name)
    for prefix in filter(None, os.environ.get("HDF5_VDS_PREFIX", "").split(":")):
        yield Path(prefix.replace("${ORIGIN}", os.path.dirname(holder)), name)
    yield Path(os.path.dirname(holder), name)
    yield Path(name)
    yield Path(os.path.dirname(os.path.realpath(holder)), name)


def _raw_file(name: str) -> Path:
    """Where HDF5 looks for a raw file of external storage."""
    return Path(os.environ.get("HDF5_EXTFILE_PREFIX", ""), name)


def _unit_bounds(rows: int, row_bytes: int, multiple: int, least_bytes: int) -> NDArray[np.int64]:
    step = multiple * -(-least_bytes // (multiple * row_bytes))
    return np.append(np.arange(0, rows, step, dtype=np.int64), rows) * row_bytes
