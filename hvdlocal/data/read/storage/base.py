"""What all storages share: extents of bytes in files, how they follow each other, and reading them with checksums."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.errors import DamagedDataError

READ_BYTES = 8 << 20
"""Bytes per read while staging: large enough for any file system to stream, small enough for a checksum in the cache."""

BLOCK_BYTES = 1 << 20
"""The least that is read at once from a file that is not staged, unless its shard is smaller."""


class Extent(Protocol):
    """Bytes that lie in one file, and their checksums: a `Shard`, or a data set of a user's own file.

    Attributes:
        path: the file.
        data_offset: position of the bytes in the file.
        data_bytes: how many there are.
        unit_bounds: int64 (units + 1,), bounds within the bytes of what each checksum covers.
    """

    @property
    def path(self) -> Path: ...
    @property
    def data_offset(self) -> int: ...
    @property
    def data_bytes(self) -> int: ...
    @property
    def unit_bounds(self) -> NDArray[np.int64]: ...

    def check_unit(self, unit: int, data: Any, /) -> None:
        """Raises ValueError, naming samples and bytes, when the bytes of a unit are not what was written."""


class Reader(Protocol):
    """An open extent. Any number of threads may read it."""

    def read(self, first: int, last: int, into: memoryview) -> None:
        """Fills `into` with units first..last-1 and checks them. Raises OSError or ValueError naming file and bytes."""

    def close(self) -> None:
        """Closes the file."""


@runtime_checkable
class Unmappable(Protocol):
    """An extent whose bytes do not lie in its file as they are (chunked, compressed): it brings its own reader.

    Attributes:
        path: the file.
        obstacle: why its bytes do not lie there as they are, "chunked or compressed" for instance.
    """

    @property
    def path(self) -> Path: ...
    @property
    def obstacle(self) -> str: ...

    def open_reader(self) -> Reader:
        """Opens the file."""


def open_reader(extent: Extent) -> Reader:
    """Opens an extent for reading; one system call per file."""
    return extent.open_reader() if isinstance(extent, Unmappable) else FileReader(extent)


class FileReader:
    """Reads units of an extent with large `preadv` calls straight to where they shall lie.

    Args:
        extent: what to read.
        sequential: whether it will be read from front to back, for which the kernel reads ahead; otherwise every call of
            `read` is one system call.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is too short.
    """

    def __init__(self, extent: Extent, *, sequential: bool = True) -> None:
        self._extent = extent
        self._descriptor = open_whole(extent)
        self._read_bytes = READ_BYTES if sequential else extent.data_bytes
        advice = os.POSIX_FADV_SEQUENTIAL if sequential else os.POSIX_FADV_RANDOM
        os.posix_fadvise(self._descriptor, 0, 0, advice)

    def read(self, first: int, last: int, into: memoryview) -> None:
        """See `Reader`."""
        extent = self._extent
        start = int(extent.unit_bounds[first])
        ends = (extent.unit_bounds[first + 1 : last + 1] - start).tolist()  # within `into`
        filled, unit, checked = 0, first, 0
        while filled < len(into):
            filled += self._pread(into[filled : filled + self._read_bytes], extent.data_offset + start + filled)
            while unit < last and ends[unit - first] <= filled:
                extent.check_unit(unit, into[checked : ends[unit - first]])
                checked = ends[unit - first]
                unit += 1

    def close(self) -> None:
        """See `Reader`."""
        os.close(self._descriptor)

    def _pread(self, into: memoryview, offset: int) -> int:
        path = self._extent.path
        try:
            count = os.preadv(self._descriptor, [into], offset)
        except OSError as error:
            raise OSError(
                error.errno, f"{path}: bytes {offset}..{offset + len(into) - 1} cannot be read: {error.strerror}"
            ) from error
        if not count:
            size = os.fstat(self._descriptor).st_size
            raise DamagedDataError(
                f"{path} now ends at byte {size}, but bytes {offset}..{offset + len(into) - 1} belong to its data: it "
                "was cut off after it was opened; copy it again, and write no file that a job reads"
            )
        return count


def open_whole(extent: Extent) -> int:
    """A descriptor of the extent's file, which is at least as long as it must be. Errors: see `FileReader`."""
    try:
        descriptor = os.open(extent.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"shard {extent.path} is missing; copy it again") from error
    size, needed = os.fstat(descriptor).st_size, extent.data_offset + extent.data_bytes
    if size < needed:
        os.close(descriptor)
        raise ValueError(f"{extent.path} has {size} bytes, but its data end at {needed}: it is cut off; copy it again")
    return descriptor


@dataclass(frozen=True, eq=False)
class Layout:
    """The samples of a split as one line of bytes: the extents' data end to end. A *position* is a place on it.

    Attributes:
        extents: the files, in order.
        sample_bytes: size of every sample, or None where sizes differ.
        sample_bounds: int64 (samples + 1,), position of each sample, or None where all have one size.
        extent_starts: int64 (extents + 1,), first sample of each extent.
    """

    extents: Sequence[Extent]
    sample_bytes: int | None
    sample_bounds: NDArray[np.int64] | None
    extent_starts: NDArray[np.int64]

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """int64 (extents + 1,), position of each extent."""
        return np.cumsum([0] + [extent.data_bytes for extent in self.extents], dtype=np.int64)

    @property
    def total_bytes(self) -> int:
        """Length of the line."""
        return int(self.bounds[-1])

    @cached_property
    def first_units(self) -> NDArray[np.int64]:
        """int64 (extents + 1,), number of the first unit of each extent when the units are counted over all of them."""
        return np.cumsum([0] + [len(extent.unit_bounds) - 1 for extent in self.extents], dtype=np.int64)

    @cached_property
    def unit_starts(self) -> NDArray[np.int64]:
        """int64 (units + 1,), position of each unit of all extents."""
        starts = [extent.unit_bounds[:-1] + base for extent, base in zip(self.extents, self.bounds, strict=False)]
        return np.append(np.concatenate(starts), self.total_bytes)

    @cached_property
    def block_bounds(self) -> NDArray[np.int64]:
        """int64 (blocks + 1,), positions of the blocks: runs of whole units of one extent, 1 to 2 MiB, or as large as the
        extent is if that is less, or one unit if that is more. They depend on nothing but the sizes of the data.
        """
        bounds = [
            cut + base
            for extent, base in zip(self.extents, self.bounds, strict=False)
            for cut in _cuts(extent.unit_bounds)
        ]
        return np.append(np.array(bounds, np.int64), self.total_bytes)

    @cached_property
    def block_starts(self) -> NDArray[np.int64]:
        """int64 (blocks + 1,), the first sample of each block."""
        if self.sample_bytes is not None:
            return self.block_bounds // self.sample_bytes
        assert self.sample_bounds is not None
        return np.searchsorted(self.sample_bounds, self.block_bounds)

    def units_between(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The units start..stop-1, counted over all extents, as (extent, first, last) with first..last-1 within it."""
        for number, base in enumerate(self.first_units[:-1].tolist()):
            count = int(self.first_units[number + 1]) - base
            first, last = max(start - base, 0), min(stop - base, count)
            if first < last:
                yield number, first, last


def _cuts(unit_bounds: NDArray[np.int64]) -> list[int]:
    """Where blocks begin, of units of the given bounds."""
    cuts, end = [0], int(unit_bounds[-1])
    while True:
        stop = int(unit_bounds[min(int(np.searchsorted(unit_bounds, cuts[-1] + BLOCK_BYTES)), len(unit_bounds) - 1)])
        if end - stop < BLOCK_BYTES:  # what is left is no block of its own
            return cuts
        cuts.append(stop)


class Storage(ABC):
    """Where the bytes of a split lie while it is read. Any number of threads may read.

    Attributes:
        mode: "ram", "mmap" or "stream".
        reason: why, for `describe`.
    """

    mode: str

    def __init__(self, layout: Layout, reason: str) -> None:
        self.layout = layout
        self.reason = reason

    def describe(self) -> str:
        """The mode and why, for a log."""
        return f"{self.mode}: {self.reason}"

    @abstractmethod
    def gather(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copies samples of one size.

        Args:
            rows: integers (n,), sample indices, known to be in range.
            out: C-contiguous uint8 (n, sample_bytes), filled.
        """

    @abstractmethod
    def view(self, start: int, stop: int) -> memoryview:
        """The bytes between two positions of one unit, read-only; they stay valid as long as somebody holds them."""

    def read_ahead(self, samples: NDArray[np.int64]) -> None:  # noqa: B027  (nothing to do is a valid answer)
        """A hint that these samples will be wanted, in this order. Returns at once."""

    @abstractmethod
    def close(self) -> None:
        """Releases files and threads. Nobody may begin to read afterwards; threads that still read keep their memory."""


class ClosedStorage(Storage):
    """What is left of a storage that was closed."""

    mode = "closed"

    def gather(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Raises ValueError."""
        raise ValueError("the data set was closed; open it again")

    def view(self, start: int, stop: int) -> memoryview:
        """Raises ValueError."""
        raise ValueError("the data set was closed; open it again")

    def close(self) -> None:
        """Does nothing."""
