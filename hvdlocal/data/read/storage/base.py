"""What all storages share: how the extents of a split follow each other, and what a storage can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.format.extent import Extent

BLOCK_BYTES = 1 << 20
"""The least that is read at once from a file that is not staged, unless its shard is smaller."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The samples of a split as one line of bytes: the extents' data end to end. A *position* is a place on it.

    Attributes:
        extents: the files, in order.
        sample_bytes: size of every sample, or None where sizes differ.
        sample_bounds: int64 (samples + 1,), position of each sample, or None where all have one size.
        extent_starts: int64 (extents + 1,), first sample of each extent.
        block_units: for each extent, the unit that each of its blocks begins with, where blocks are not those of
            `cut_blocks`: columns that are read together have blocks of the same samples.
    """

    extents: Sequence[Extent]
    sample_bytes: int | None
    sample_bounds: NDArray[np.int64] | None
    extent_starts: NDArray[np.int64]
    block_units: Sequence[NDArray[np.int64]] | None = None

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
        units = self.block_units or [cut_blocks(extent.unit_bounds) for extent in self.extents]
        bounds = [
            extent.unit_bounds[first] + base
            for extent, base, first in zip(self.extents, self.bounds[:-1], units, strict=True)
        ]
        return np.append(np.concatenate(bounds), self.total_bytes)

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


def cut_blocks(unit_bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """The units that blocks begin with, of units of the given bounds."""
    first, end = [0], int(unit_bounds[-1])
    while True:
        stop = min(int(np.searchsorted(unit_bounds, unit_bounds[first[-1]] + BLOCK_BYTES)), len(unit_bounds) - 1)
        if end - int(unit_bounds[stop]) < BLOCK_BYTES:  # what is left is no block of its own
            return np.array(first, np.int64)
        first.append(stop)


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
