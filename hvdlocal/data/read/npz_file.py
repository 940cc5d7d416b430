"""Arrays in an .npz file that somebody else wrote: where their bytes lie, without reading them.

An array that `numpy.savez` stored lies in the file as it is. One of `numpy.savez_compressed` is unpacked from its beginning
on, a run of samples at a time; one in Fortran order is read as a whole, since its samples are scattered all over it.
"""

from __future__ import annotations

import math
import struct
import threading
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from hvdlocal.data.errors import DamagedDataError
from hvdlocal.data.format.extent import READ_BYTES, Reader
from hvdlocal.data.kinds.numbers import require_numbers
from hvdlocal.data.read.foreign_extents import Contiguous, Found, unit_bounds
from hvdlocal.data.read.storage.base import BLOCK_BYTES

_SUFFIX = ".npy"
_LOCAL_HEADER = struct.Struct("<26x2H")  # of a member: lengths of its name and of what follows the name
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True, eq=False)
class Member(Contiguous):
    """An array of an .npz file.

    Attributes:
        member: its name in the zip file.
    """

    member: str

    def check_sum(self) -> None:
        """Reads all of the array and compares its checksum. Raises DamagedDataError; OSError, if it cannot be read."""
        try:
            with zipfile.ZipFile(self.path) as file, file.open(self.member) as stream:
                while stream.read(READ_BYTES):  # at the end, zipfile compares
                    pass
        except (EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise DamagedDataError(f"{self.path} is damaged ({error}); copy the file again") from error


@dataclass(frozen=True, eq=False)
class PackedMember(Member):
    """An `Unmappable` extent: an array that does not lie in the file as it is. `data_offset` means nothing.

    Attributes:
        header_bytes: length of what stands before its numbers.
        dtype: as it is stored.
        fortran: whether it is stored in Fortran order.
        obstacle: see `Unmappable`.
    """

    header_bytes: int
    dtype: np.dtype[Any]
    fortran: bool
    obstacle: str

    def open_reader(self) -> Reader:
        """See `Unmappable`."""
        return _MemberReader(self)


class _MemberReader:
    """A `Reader` of an array of an .npz file. Reading on where the last call ended unpacks nothing twice."""

    def __init__(self, extent: PackedMember) -> None:
        self._extent = extent
        self._lock = threading.Lock()
        self._file = zipfile.ZipFile(extent.path)
        self._stream: IO[bytes] | None = None
        self._whole = memoryview(b"")  # of an array in Fortran order

    def read(self, first: int, last: int, into: memoryview) -> None:
        """See `Reader`."""
        extent = self._extent
        start, stop = (int(extent.unit_bounds[unit]) for unit in (first, last))
        try:
            with self._lock:
                if extent.fortran:
                    into[:] = self._everything()[start:stop]
                else:
                    self._unpack(start, into)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise DamagedDataError(
                f"{extent.path}: bytes {start}..{stop - 1} of {extent.member} cannot be unpacked ({error}); copy the file again"
            ) from error
        if not extent.fortran and extent.dtype.byteorder == ">":
            np.frombuffer(into, extent.dtype).byteswap(inplace=True)

    def close(self) -> None:
        """See `Reader`."""
        self._file.close()

    def _everything(self) -> memoryview:
        if not self._whole:
            with self._file.open(self._extent.member) as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
            rows = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            self._whole = memoryview(rows.tobytes())
        return self._whole

    def _unpack(self, start: int, into: memoryview) -> None:
        if self._stream is None:
            self._stream = self._file.open(self._extent.member)
        self._stream.seek(self._extent.header_bytes + start)  # backwards, it unpacks from the beginning again
        filled = 0
        while filled < len(into):
            part = self._stream.read(min(len(into) - filled, READ_BYTES))
            if not part:
                raise EOFError("it ends too soon")
            into[filled : filled + len(part)] = part
            filled += len(part)


def is_npz(path: Path) -> bool:
    """Whether a file is a zip file, as .npz files are, whatever its name."""
    with path.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def is_npy(path: Path) -> bool:
    """Whether a file is one of `numpy.save`, whatever its name."""
    with path.open("rb") as file:
        return file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX


def find_member(path: Path, name: str) -> Found:
    """What an .npz file says of an array, and where its bytes lie.

    Raises:
        ValueError: there is no such array, or the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as file:
            members = [member for member in file.namelist() if member.endswith(_SUFFIX)]
            if name + _SUFFIX not in members:
                found = ", ".join(member.removesuffix(_SUFFIX) for member in members[:20])
                raise ValueError(f"{path} has no array {name}; it has {found or 'none'}")
            info = file.getinfo(name + _SUFFIX)
            with file.open(info) as stream:
                version = np.lib.format.read_magic(stream)
                if version not in _READ_HEADER:
                    raise ValueError(f"{path} holds {name} as records with names that are not ASCII: write numbers")
                shape, fortran, dtype = _READ_HEADER[version](stream)
                header_bytes = stream.tell()
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read as .npz ({error}); copy or write it again") from error
    require_numbers(f"{path} holds {name} as", dtype, shape)
    little, row_bytes = dtype.newbyteorder("<"), dtype.itemsize * math.prod(shape[1:])
    fortran = fortran and len(shape) > 1
    if fortran:
        obstacle = "in Fortran order"
    elif info.compress_type != zipfile.ZIP_STORED:
        obstacle = "compressed"
    elif dtype != little:
        obstacle = "big-endian"
    else:
        bounds = unit_bounds(shape[0], row_bytes, 1, BLOCK_BYTES)
        stored = Member(path, _data_offset(path, info) + header_bytes, shape[0] * row_bytes, bounds, info.filename)
        return Found(stored, little, shape, info.header_offset, 0)
    bounds = unit_bounds(shape[0], row_bytes, 1, READ_BYTES)
    packed = PackedMember(path, 0, shape[0] * row_bytes, bounds, info.filename, header_bytes, dtype, fortran, obstacle)
    return Found(packed, little, shape, info.header_offset, 0)


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the content of a member begins in the zip file."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name, more = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return int(info.header_offset + _LOCAL_HEADER.size + name + more)
