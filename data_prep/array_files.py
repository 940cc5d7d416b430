"""Named arrays in HDF5 and .npz files, read as a writer needs them: checked once, and then in any order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.unpacked import unpack
from hvdlocal.communicator import Communicator, succeed_together
from hvdlocal.data.format.extent import READ_BYTES
from hvdlocal.data.format.manifest import sha256_of_json
from hvdlocal.data.read.foreign_extents import Contiguous
from hvdlocal.data.read.named_arrays import NamedArrays, extents_of, find_arrays, layout_of, named_by, obstacle_in
from hvdlocal.data.read.npz_file import Member
from hvdlocal.data.read.storage.mapped import MappedStorage


@dataclass(frozen=True)
class Rows:
    """Samples of one array: an array-like that is read by slices and by arrays of indices.

    Attributes:
        storage: the array in all files.
        rows: int64 (n,), which of its samples they are.
        dtype: type of the numbers.
        shape: (n, …).
    """

    storage: MappedStorage
    rows: NDArray[np.int64]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | NDArray[np.integer]) -> NDArray[Any]:
        rows = self.rows[index]
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if len(rows):
            self.storage.gather(rows, out.reshape(len(rows), -1).view(np.uint8))
        return out


class ArrayFiles:
    """Arrays in one or several files whose samples follow each other. Opening them is a collective.

    Args:
        source: files and names.
        scratch: directory for what must be unpacked; `close` removes it.
        communicator: the ranks.

    Attributes:
        named: what was found in the files.
        identity: hex sha256 of all numbers, and of names, types and shapes.
        samples: what a sample is: "x float32 (16, 16), y float32 ()".
        sample_bytes: bytes of all arrays of a sample.
        nonfinite: a sentence for each array that holds numbers which are NaN or infinite, by its name.
        packed: why some arrays had to be unpacked, "mine.h5: x is chunked or compressed"; None if none had.

    Raises:
        FileNotFoundError, ValueError: see `open_arrays`; on every rank.
        OSError: a file cannot be read, or what is unpacked not written.
    """

    def __init__(self, source: NamedArrays, scratch: Path, communicator: Communicator) -> None:
        self.source = source
        files = find_arrays(source, communicator)
        self.named = named_by(source, files)
        self._starts = np.cumsum([0] + [file.num_samples for file in files], dtype=np.int64)
        self._arrays = files[0].arrays
        pairs = list(zip(source.names, self._arrays, strict=True))
        self.samples = ", ".join(f"{name} {array.dtype} {array.shape[1:]}" for name, array in pairs)
        self.sample_bytes = sum(array.extent.data_bytes // array.shape[0] for array in self._arrays)
        extents = extents_of(source, files)
        succeed_together(communicator, lambda: _check_sums(extents, communicator), "data.checksums")
        self.packed = obstacle_in(source, extents)
        columns, self.close = unpack(extents, scratch, communicator)
        try:
            layouts = [layout_of(extents, self._starts) for extents in columns]
            self._storages = succeed_together(
                communicator, lambda: [MappedStorage(layout, "for a writer") for layout in layouts], "data.map"
            )
            self.identity, self.nonfinite = self._look(communicator)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, name: str, chosen: NDArray[np.int64]) -> Rows:
        """Some samples of an array."""
        column = self.source.names.index(name)
        array = self._arrays[column]
        return Rows(self._storages[column], chosen, array.dtype, (len(chosen), *array.shape[1:]))

    def _look(self, communicator: Communicator) -> tuple[str, dict[str, str]]:
        """Reads everything once; each rank takes every size-th group of samples."""
        digests, nonfinite = [], {}
        everything = np.arange(len(self))
        for name in self.source.names:
            array = self.rows(name, everything)
            row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:]))
            step = max(1, READ_BYTES // row_bytes)
            begins = range(0, len(self), step)

            def look(array: Rows = array, begins: range = begins) -> list[_Group]:
                mine = begins[communicator.rank :: communicator.size]
                return [_group(begin, array[begin : begin + begins.step]) for begin in mine]

            found = communicator.gather(succeed_together(communicator, look, "data.look"), "data.groups")
            groups = [found[number % communicator.size][number // communicator.size] for number in range(len(begins))]
            digests.append(hashlib.sha256(b"".join(group.sha256 for group in groups)).hexdigest())
            if numbers := sum(group.numbers for group in groups):
                first = next(group.first for group in groups if group.numbers)
                samples = sum(group.samples for group in groups)
                nonfinite[name] = (
                    f"{name} holds {numbers} number{'s that are' if numbers > 1 else ' that is'} not finite, in {samples} "
                    f"sample{'s' * (samples > 1)}, the first in {self._name_of(first)}"
                )
        return sha256_of_json({"samples": self.samples, "number": len(self), "sha256": digests}), nonfinite

    def _name_of(self, sample: int) -> str:
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return f"sample {sample - int(self._starts[number])} of {self.source.paths[number]}"


def _check_sums(columns: Sequence[Sequence[Contiguous]], communicator: Communicator) -> None:
    """Compares the checksums that .npz files have; each rank those of every size-th array."""
    members = [extent for column in columns for extent in column if isinstance(extent, Member)]
    for member in members[communicator.rank :: communicator.size]:
        member.check_sum()


@dataclass(frozen=True)
class _Group:
    """What was found in a run of samples: their sha256, how many numbers are not finite, in how many samples, and the first."""

    sha256: bytes
    numbers: int
    samples: int
    first: int


def _group(begin: int, values: NDArray[Any]) -> _Group:
    digest = hashlib.sha256(values.data if values.size else b"").digest()
    if values.dtype.kind != "f":
        return _Group(digest, 0, 0, 0)
    bad = np.count_nonzero(~np.isfinite(values.reshape(len(values), -1)), axis=1)
    where = np.flatnonzero(bad)
    return _Group(digest, int(bad.sum()), len(where), begin + int(where[0]) if len(where) else 0)
