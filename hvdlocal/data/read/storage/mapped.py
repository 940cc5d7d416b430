"""Shards mapped into memory where they lie: for local disks."""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.format.extent import Extent, open_whole
from hvdlocal.data.read.storage.base import Layout, Storage

_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0  # what Python's mmap module does not name
_FAILED = ctypes.c_void_p(-1).value
_MOST_GAP_PAGES = 4096  # 16 MiB of addresses per file; batch systems limit those too (ulimit -v)

_mmap = ctypes.CDLL(None, use_errno=True).mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)


class MappedStorage(Storage):
    """All files in one range of addresses, so that samples of many shards are gathered by one call.

    A loop over the shards, which needs none of this, gathers batches of 256 CIFAR-10 images at 0.75 of the rate from four shards
    and at 0.52 from sixteen: `out[rows of a shard] = …` copies twice.

    Every checksum is compared when its bytes are touched for the first time, and never again. A file that somebody cuts
    off while it is mapped ends the process (SIGBUS): this is for local files that nobody writes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is too short.
    """

    mode = "mmap"

    def __init__(self, layout: Layout, reason: str) -> None:
        super().__init__(layout, reason)
        starts, length = _arrange(layout.extents, layout.sample_bytes or 1)
        self._memory = _map(layout.extents, starts, length)
        self._shift = np.array(starts) - layout.bounds[:-1]  # from a position to a place in the range
        self._seen = np.zeros(len(layout.unit_starts) - 1, bool)
        self._all_seen = False
        if layout.sample_bytes is not None:
            self._prepare_gather(starts, layout.sample_bytes)

    def _prepare_gather(self, starts: list[int], sample_bytes: int) -> None:
        memory, first = self._memory, starts[0]
        self._later = self.layout.extent_starts[1:-1]  # where each extent but the first begins
        self._aligned = all((start - first) % sample_bytes == 0 for start in starts)
        if self._aligned:
            num_rows = (len(memory) - first) // sample_bytes
            self._images = memory[first : first + num_rows * sample_bytes].reshape(num_rows, sample_bytes)
            places = (np.array(starts) - first) // sample_bytes
            self._row_shift = places - self.layout.extent_starts[:-1]
        else:  # an image may begin at any byte
            shape = (len(memory) - sample_bytes + 1, sample_bytes)
            self._images = np.lib.stride_tricks.as_strided(memory, shape, (1, 1), writeable=False)
            self._row_shift = np.array(starts) - self.layout.extent_starts[:-1] * sample_bytes
        if (self._row_shift == self._row_shift[0]).all():  # data that fill whole pages follow each other without gaps
            self._row_shift = self._row_shift[:1]

    def gather(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """See `Storage`."""
        if not self._all_seen:
            assert self.layout.sample_bytes is not None
            positions = rows.astype(np.int64) * self.layout.sample_bytes
            self._check(np.searchsorted(self.layout.unit_starts, positions, side="right") - 1)
        shift = self._row_shift
        if (
            len(shift) > 1
        ):  # a search in few numbers is cheaper than a look into a table of all samples, which no cache holds
            shift = shift.take(self._later.searchsorted(rows, "right"))
        if self._aligned:
            self._images.take(rows + shift, 0, out, "clip")  # "raise" would go through a buffer
        else:  # whose rows overlap: `take` would copy all of them
            out[...] = self._images[rows * len(out[0]) + shift]

    def view(self, start: int, stop: int) -> memoryview:
        """See `Storage`."""
        if not self._all_seen:
            self._check(np.searchsorted(self.layout.unit_starts, [start], side="right") - 1)
        shift = int(self._shift[np.searchsorted(self.layout.bounds, start, side="right") - 1])
        return self._memory[start + shift : stop + shift].data

    def close(self) -> None:
        """See `Storage`. The files stay mapped until the last reader and the last view of them are gone."""

    def _check(self, units: NDArray[np.int64]) -> None:
        new = np.unique(units[~self._seen[units]])
        for unit in new.tolist():
            number = int(np.searchsorted(self.layout.first_units, unit, side="right")) - 1
            start, stop = (self.layout.unit_starts[unit : unit + 2] + self._shift[number]).tolist()
            within = unit - int(self.layout.first_units[number])
            self.layout.extents[number].check_unit(within, self._memory[start:stop].data)
            self._seen[unit] = True
        if len(new):
            self._all_seen = bool(self._seen.all())


def _arrange(extents: Sequence[Extent], stride: int) -> tuple[list[int], int]:
    """Where the data of each extent begin in a range of addresses, and its length.

    Files map to whole pages only. Their order leaves gaps in between, so wide that all data begin a multiple of
    `stride` apart; addresses cost little. Where that cannot be (it takes data offsets that are equal modulo
    gcd(page, stride)), or would take more than _MOST_GAP_PAGES, the gaps are as small as they can be.
    """
    page = mmap.PAGESIZE
    step = math.gcd(page, stride)
    period = stride // step
    starts: list[int] = []
    end = 0
    for extent in extents:
        lead = extent.data_offset % page
        number = -(-end // page)  # of the page where the file's map begins
        if starts and period <= _MOST_GAP_PAGES and (starts[0] - lead) % step == 0:
            wanted = (starts[0] - lead) // step * pow(page // step, -1, period) % period
            number += (wanted - number) % period
        starts.append(number * page + lead)
        end = starts[-1] + extent.data_bytes
    return starts, end


def _map(extents: Sequence[Extent], starts: list[int], length: int) -> NDArray[np.uint8]:
    """The files' data at `starts` in one read-only array of `length` bytes; what lies between must not be touched."""
    # The range is reserved, and finally released with all that was mapped into it, by an object of Python's.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        memory = np.frombuffer(mmap.mmap(-1, length, flags=flags, prot=_PROT_NONE), np.uint8)
    except (OSError, OverflowError) as error:
        raise _unmappable(extents[0], getattr(error, "errno", None) or errno.ENOMEM) from error
    for extent, start in zip(extents, starts, strict=True):
        lead = extent.data_offset % mmap.PAGESIZE
        descriptor = open_whole(extent)
        try:
            found = _mmap(
                memory.ctypes.data + start - lead,
                lead + extent.data_bytes,
                mmap.PROT_READ,
                mmap.MAP_SHARED | _MAP_FIXED,
                descriptor,
                extent.data_offset - lead,
            )
        finally:
            os.close(descriptor)
        if found == _FAILED:
            raise _unmappable(extent, ctypes.get_errno())
    return memory


def _unmappable(extent: Extent, number: int) -> OSError:
    return OSError(
        number, f"{extent.path} cannot be mapped into memory ({os.strerror(number)}); choose storage 'ram' or 'stream'"
    )
