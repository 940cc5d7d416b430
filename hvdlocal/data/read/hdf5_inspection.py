"""One HDF5 file that somebody else wrote: which data sets it has, and where their bytes really lie.

A name in a file may stand for data that lie elsewhere: behind a link, in raw files, or put together from several data sets. So
everything that is asked of a data set is asked of the file that holds it (`Dataset.file`), and what nobody wrote, which HDF5
reads as zeros without an error, is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np

from hvdlocal.data.format.extent import READ_BYTES
from hvdlocal.data.format.hdf5 import is_stored, open_for_reading
from hvdlocal.data.read.foreign_extents import Contiguous, Found, Packed, unit_bounds
from hvdlocal.data.read.storage.base import BLOCK_BYTES

T = TypeVar("T")

_COPY = "copy it again"
_NUMPY = (b"\x93NUM", b"PK\x03\x04")  # how .npy and .npz files begin


def inspect(path: Path, look: Callable[[Inspection], T], holding: str) -> T:
    """Opens a file and looks into it.

    Args:
        path: the file.
        look: returns what it finds, or raises ValueError.
        holding: what the file should hold, for the message: "images and labels".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be used; the message names it and mostly the remedy.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name the HDF5 files in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name an HDF5 file of {holding}")
    with path.open("rb") as begin:
        if begin.read(4) in _NUMPY:
            raise ValueError(
                f"{path} is a NumPy file, but {holding} are read from HDF5 files only: write one with h5py"
            )
    with open_for_reading(path, "copy or write it again") as file:
        try:
            return look(Inspection(path, file))
        except RecursionError as error:
            raise ValueError(
                f"{path} holds a virtual data set that takes its data from itself; write it again"
            ) from error
        except (OSError, KeyError, RuntimeError, TypeError, MemoryError) as error:
            # What h5py raises, beside ValueError, for a file whose inside is not what it should be.
            reason = str(error) or type(error).__name__
            raise ValueError(f"{path} is damaged: HDF5 says {reason}; {_COPY}") from error


@dataclass(frozen=True)
class Named:
    """The samples that a user named.

    Attributes:
        paths: the named files, by this rank's names.
        columns: for each array, what was found in each file.
    """

    paths: Sequence[Path]
    columns: Sequence[Sequence[Found]]


class Inspection:
    """Looking at one named file, and at every other that its data come from.

    Attributes:
        path: the named file.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file
        self._sources: set[str] = set()
        self._parts: set[tuple[str, int]] = set()

    @property
    def sources(self) -> tuple[str, ...]:
        """All other files that data come from which were asked for until now, each as `Found.holder`."""
        return tuple(sorted(self._sources))

    def dataset(self, name: str) -> h5py.Dataset:
        """The data set of a name. Raises ValueError where there is none."""
        return self._dataset(self._file, name)

    def find(self, dataset: h5py.Dataset, name: str, channels_first: bool = False) -> Found:
        """Where the bytes of a data set lie. Its first axis counts samples, and it is not empty.

        Raises:
            ValueError: a part of it was never written, is missing, or cannot be unpacked.
        """
        self._parts.clear()
        self.require_written(dataset)
        parts = tuple(sorted(self._parts))
        extent = self._extent(dataset, name, channels_first)
        return Found(
            extent,
            dataset.dtype.newbyteorder("<"),
            dataset.shape,
            h5py.h5o.get_info(dataset.id).addr,
            dataset.fillvalue,
            None if isinstance(extent, Packed) else self._elsewhere(dataset),
            parts,
        )

    def _extent(self, dataset: h5py.Dataset, name: str, channels_first: bool) -> Contiguous:
        dtype = dataset.dtype.newbyteorder("<")
        row_bytes = dtype.itemsize * math.prod(dataset.shape[1:])
        data_bytes = len(dataset) * row_bytes
        properties = dataset.id.get_create_plist()
        layout, stored = properties.get_layout(), dataset.id.get_type()
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
        elif dataset.dtype.itemsize > 1 and dataset.dtype != dtype:
            obstacle = "big-endian"
        elif not _is_plain(stored, dtype):
            obstacle = "of a type with unused bits"
        else:
            bounds = unit_bounds(len(dataset), row_bytes, 1, BLOCK_BYTES)
            return Contiguous(self.path, int(dataset.id.get_offset()), data_bytes, bounds)
        bounds = unit_bounds(len(dataset), row_bytes, dataset.chunks[0] if dataset.chunks else 1, READ_BYTES)
        return Packed(self.path, 0, data_bytes, bounds, name, dtype, obstacle, channels_first)

    # -- what was never written ---------------------------------------------------------------------------------------

    def require_written(self, dataset: h5py.Dataset) -> None:
        """Raises ValueError for data that were never written: HDF5 would read them as zeros without an error."""
        self._elsewhere(dataset)
        where, properties = self.where(dataset), dataset.id.get_create_plist()
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
        where, left = self.where(dataset), dataset.size * dataset.dtype.itemsize
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
        where, shape = self.where(dataset), dataset.shape
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
        where = self.where(dataset)
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
                f"{self.where(dataset)} has {dataset.name} as {dataset.dtype}, but takes it from {type_of(part)} in "
                f"{self.where(part)}: HDF5 would cut the values off; convert them"
            )
        if source.src_space.get_select_type() == h5py.h5s.SEL_HYPERSLABS:
            _, final = source.src_space.get_select_bounds()
            if len(final) != part.ndim or any(stop >= size for stop, size in zip(final, part.shape, strict=True)):
                raise ValueError(
                    f"{self.where(part)} holds {part.name} of shape {part.shape}, but {self.where(dataset)} takes a part of "
                    f"it that ends at {tuple(stop + 1 for stop in final)}: copy both again"
                )
        elif part.size < source.vspace.get_select_npoints():
            raise ValueError(
                f"{self.where(part)} holds {part.name} of shape {part.shape}, less than {self.where(dataset)} takes from it: "
                "copy both again"
            )
        self.require_written(part)
        self._parts.add((self._elsewhere(part) or self.path.name, h5py.h5o.get_info(part.id).addr))

    # -- names --------------------------------------------------------------------------------------------------------

    def _dataset(self, file: h5py.File, name: str) -> h5py.Dataset:
        found = file.get(name)
        where = self.path if file is self._file else file.filename
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

    def where(self, dataset: h5py.Dataset) -> Path | str:
        """The file that holds a data set, by the user's name for it if it is the named one."""
        holder: str = dataset.file.filename
        return self.path if holder == self._file.filename else holder

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


def type_of(dataset: h5py.Dataset) -> str:
    """The type of a data set, for a message."""
    if h5py.check_ref_dtype(dataset.dtype) is not None:
        return "references"
    if h5py.check_vlen_dtype(dataset.dtype) is not None:
        return "arrays of various lengths (JPEGs, perhaps, which `python -m data_prep imagenet` takes as files)"
    return str(dataset.dtype)


def refuse_twice(paths: Sequence[Path], files: Sequence[Found]) -> None:
    """Raises ValueError for samples that come twice.

    Args:
        paths: the named files, by this rank's names.
        files: what was found in each, for one name.
    """
    if pair := _same_samples(paths, files):
        names = f"{pair[0]} is named twice" if pair[0] == pair[1] else f"{pair[0]} and {pair[1]} are the same samples"
        raise ValueError(f"{names}, so each of them would come twice in an epoch; name every file once")


def refuse_trained_on(train: Named, test: Named) -> None:
    """Raises ValueError for samples that are both to train on and to test on."""
    for ours, theirs in zip(train.columns, test.columns, strict=True):
        if pair := _same_samples([*train.paths, *test.paths], [*ours, *theirs]):
            names = f"{pair[0]} is" if pair[0] == pair[1] else f"{pair[0]} and {pair[1]} are the same samples,"
            raise ValueError(
                f"{names} both to train on and to test on; name other files to test on, or hold a share out"
            )


def _same_samples(paths: Sequence[Path], files: Sequence[Found]) -> tuple[Path, Path] | None:
    """The first two files of which the second holds, or puts together, what the first holds."""
    seen: dict[tuple[int, int, int], int] = {}
    for number, (path, found) in enumerate(zip(paths, files, strict=True)):
        first = seen.setdefault(_place(holder_of(path, found), found.address), number)
        if first != number:
            return paths[first], path
    for number, (path, found) in enumerate(zip(paths, files, strict=True)):  # virtual ones, which may be of these files
        for name, address in found.parts:
            first = seen.get(_place(path.parent / name, address), number)
            if first != number:
                return paths[first], path
    return None


def holder_of(path: Path, found: Found) -> Path:
    """The file that holds the bytes, by this rank's name of the named file."""
    return path if found.holder is None else path.parent / found.holder


def _place(path: Path, address: int) -> tuple[int, int, int]:
    """What identifies a data set, whatever the name of its file: device and inode of the file, and an address in it."""
    found = path.stat()
    return found.st_dev, found.st_ino, address


def _is_plain(stored: h5py.h5t.TypeID, dtype: np.dtype[Any]) -> bool:
    """Whether the stored type is NumPy's, so that the bytes in the file are those in memory."""
    if dtype == np.uint8:
        return stored.equal(h5py.h5t.STD_U8LE) or stored.equal(h5py.h5t.STD_U8BE)
    return stored.equal(h5py.h5t.py_create(dtype))


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
