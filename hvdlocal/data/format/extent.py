"""Bytes that lie in one file with their checksums, and reading them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.errors import DamagedDataError

READ_BYTES = 8 << 20
"""Bytes per read while staging: large enough for any file system to stream, small enough for a checksum in the cache."""


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


def open_reader(extent: Extent, *, sequential: bool = True) -> Reader:
    """Opens an extent for reading; `sequential` as for `FileReader`."""
    return extent.open_reader() if isinstance(extent, Unmappable) else FileReader(extent, sequential=sequential)


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
