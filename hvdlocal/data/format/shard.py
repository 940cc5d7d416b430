"""One shard file (format version 1, docs/data-format.md): opening it and checking it. `write/shard_writer.py` writes it."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.errors import DamagedDataError
from hvdlocal.data.format.extent import READ_BYTES, FileReader
from hvdlocal.data.format.hdf5 import is_stored, open_for_reading
from hvdlocal.data.format.manifest import FORMAT, MANIFEST_NAME, VERSION, Manifest, ShardEntry, sha256_of_json
from hvdlocal.data.kinds import KINDS
from hvdlocal.data.kinds.base import Column, Kind

_REWRITE = "write the data set again (python -m data_prep … --overwrite)"


@dataclass(frozen=True, eq=False)
class StoredColumn:
    """A column of a shard that was opened: an `Extent`.

    Attributes:
        path: the file.
        data_offset: position of the data in the file, in bytes.
        column: what the data are.
        crc32: uint32 (units,), checksum of each unit.
    """

    path: Path
    data_offset: int
    column: Column
    crc32: NDArray[np.uint32]

    @property
    def data_bytes(self) -> int:
        """Length of the data."""
        return self.column.num_bytes

    @cached_property
    def unit_bounds(self) -> NDArray[np.int64]:
        """int64 (units + 1,); unit u is made of the bytes unit_bounds[u]:unit_bounds[u + 1] of the data."""
        return self.column.unit_bounds

    def check_unit(self, unit: int, data: bytes | bytearray | memoryview) -> None:
        """Compares the checksum of a unit's bytes.

        Args:
            unit: its number, in 0..len(crc32)-1.
            data: its bytes, C-contiguous.

        Raises:
            ValueError: they are not what was written; the message names the shard, samples, bytes and checksums.
        """
        found = zlib.crc32(data)
        expected = int(self.crc32[unit])
        if found != expected:
            start, stop = (int(bound) + self.data_offset for bound in self.unit_bounds[unit : unit + 2])
            first, last = self.column.unit_starts[unit : unit + 2].tolist()
            samples = f"sample {first}" if last == first + 1 else f"samples {first}..{last - 1}"
            raise DamagedDataError(
                f"{self.path} is damaged in {samples} (bytes {start}..{stop - 1} of the file): their crc32 is "
                f"{found:08x}, {expected:08x} was written; copy the file again, or {_REWRITE}"
            )

    def verify(self) -> None:
        """Reads all data, in pieces of some MiB, and compares every checksum.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: as `check_unit`, for the first damaged unit; or the file is cut off.
        """
        bounds, first = self.unit_bounds, 0
        with closing(FileReader(self)) as reader:
            while first < len(self.crc32):
                last = int(np.searchsorted(bounds, bounds[first] + READ_BYTES, side="right")) - 1
                last = max(last, first + 1)
                reader.read(first, last, memoryview(bytearray(int(bounds[last] - bounds[first]))))
                first = last


@dataclass(frozen=True, eq=False)
class Shard:
    """A shard that was opened: its tables, and where its data lie. Nothing stays open or mapped.

    Attributes:
        path: the file.
        num_samples: how many samples it holds.
        tables: the tables by their names.
        columns: the data.
    """

    path: Path
    num_samples: int
    tables: Mapping[str, NDArray[Any]]
    columns: tuple[StoredColumn, ...]

    def at(self, path: Path) -> Shard:
        """The same shard in a file of another name."""
        return replace(self, path=path, columns=tuple(replace(column, path=path) for column in self.columns))

    def verify(self) -> None:
        """Reads all data and compares every checksum. Raises FileNotFoundError and ValueError as `StoredColumn.verify`."""
        for column in self.columns:
            column.verify()


def content_sha256(kind: Kind, tables: Mapping[str, NDArray[Any]]) -> str:
    """Hex sha256 over the tables: identifies the content for a few bytes a sample, since they hold the checksums.

    Args:
        kind: of the samples; it says in which order.
        tables: the arrays as they lie in the file, little-endian.
    """
    digest = hashlib.sha256()
    for name in kind.digested(tables):
        digest.update(tables[name].tobytes())
    return digest.hexdigest()


def shard_attributes(manifest: Manifest) -> dict[str, str | int]:
    """The attributes by which a shard file says what it is; a reader expects exactly these values."""
    sealed = KINDS[manifest.kind].sealed(manifest.facts)
    return {
        "format": FORMAT,
        "version": VERSION,
        "split": manifest.split,
        "seed": manifest.seed,
        **{name: sha256_of_json(content) for name, content in sealed.items()},
    }


def open_shard(path: Path, entry: ShardEntry, manifest: Manifest) -> Shard:
    """Opens a shard and checks everything that can be checked without reading its data.

    Args:
        path: the file.
        entry: what the manifest says of it.
        manifest: the split's.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is truncated, not a shard of this format, or not the shard that the manifest describes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"shard {path} is missing; copy it again, or {_REWRITE}")
    if (size := path.stat().st_size) != entry.bytes:
        raise ValueError(f"{path} has {size} bytes where the manifest says {entry.bytes}; copy it again")
    file = open_for_reading(path, f"copy it again, or {_REWRITE}")
    try:
        with file:
            shard = _read_shard(path, file, entry, manifest)
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError, OSError) as error:
        # What h5py and NumPy make of an HDF5 header with wrong bits.
        raise ValueError(f"{path} is damaged ({error}); copy it again, or {_REWRITE}") from error
    kind = KINDS[manifest.kind]
    if content_sha256(kind, shard.tables) != entry.sha256:
        raise ValueError(
            f"{path} is not the shard that {MANIFEST_NAME} describes (stale manifest or shard); copy both again"
        )
    try:
        kind.check_tables(manifest.facts, shard.tables)
    except ValueError as error:
        raise ValueError(f"{path} holds {error}; {_REWRITE}") from None
    return shard


def _read_shard(path: Path, file: h5py.File, entry: ShardEntry, manifest: Manifest) -> Shard:
    _check_attributes(path, file, shard_attributes(manifest))
    kind, facts, n = KINDS[manifest.kind], manifest.facts, entry.num_samples
    tables = {name: _read(path, file, name, *expected) for name, expected in kind.tables(facts, n).items()}
    try:
        columns = kind.columns(facts, n, tables)
    except ValueError as error:
        raise ValueError(f"{path} holds {error}; {_REWRITE}") from None
    units = np.cumsum([len(column.unit_starts) - 1 for column in columns])
    checksums = np.split(tables["crc32"].ravel(), units[:-1])
    stored = [
        StoredColumn(path, _data_offset(path, file, column), column, crc32)
        for column, crc32 in zip(columns, checksums, strict=True)
    ]
    return Shard(path, n, tables, tuple(stored))


def _check_attributes(path: Path, file: h5py.File, attributes: Mapping[str, str | int]) -> None:
    for name, expected in attributes.items():
        found = file.attrs.get(name)
        if np.ndim(found) or found != expected:
            raise ValueError(
                f"{path} has {name} {found} where {expected} is expected: it is another data set's; {_REWRITE}"
            )


def _data_offset(path: Path, file: h5py.File, column: Column) -> int:
    """Byte offset of the data in the file, after making sure that they do lie there raw and in one piece."""
    name = column.name
    data = _dataset(path, file, name, column.dtype, column.shape)
    if data.id.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS:
        raise ValueError(
            f"{path} stores /{name} chunked, compact or virtual, which cannot be mapped; "
            f"rewrite it with `h5repack -l {name}:CONTI`"
        )
    offset, num_bytes = data.id.get_offset(), column.num_bytes
    if not is_stored(data) or path.stat().st_size < offset + num_bytes:
        raise ValueError(
            f"{path} does not hold the {num_bytes} bytes of /{name} (never written, cut off, or "
            f"in another file); {_REWRITE}"
        )
    return int(offset)


def _read(path: Path, file: h5py.File, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    return np.asarray(_dataset(path, file, name, np.dtype(dtype), shape)[:])


def _dataset(path: Path, file: h5py.File, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> h5py.Dataset:
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{path} has no dataset /{name}; {_REWRITE}")
    if dataset.dtype != dtype or dataset.shape != shape:
        raise ValueError(
            f"{path} holds /{name} as {dataset.dtype} {dataset.shape} where {dtype} {shape} is expected; {_REWRITE}"
        )
    return dataset
