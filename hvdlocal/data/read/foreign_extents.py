"""Extents of files that somebody else wrote: samples that lie there as they are, and those that HDF5 must put together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.format.extent import Reader
from hvdlocal.data.format.hdf5 import open_for_reading


@dataclass(frozen=True, eq=False)
class Contiguous:
    """An `Extent`: samples that lie in a file as they are. There are no checksums; the units say where it may be cut."""

    path: Path
    data_offset: int
    data_bytes: int
    unit_bounds: NDArray[np.int64]

    def check_unit(self, unit: int, data: Any) -> None:
        """Does nothing, as there are no checksums."""


@dataclass(frozen=True, eq=False)
class Packed(Contiguous):
    """An `Unmappable` extent: samples that HDF5 must put together. `data_offset` means nothing.

    Attributes:
        name: of the data set, in the file `path`.
        dtype: type of its numbers as they are read; little-endian.
        obstacle: see `Unmappable`.
        channels_first: whether its samples are (C, H, W), of which (H, W, C) is made.
    """

    name: str
    dtype: np.dtype[Any]
    obstacle: str
    channels_first: bool = False

    def open_reader(self) -> Reader:
        """See `Unmappable`."""
        return _Unpacker(self)


class _Unpacker:
    """A `Reader` through HDF5. A unit is a run of whole chunks, so no chunk is unpacked twice."""

    def __init__(self, extent: Packed) -> None:
        self._extent = extent
        self._file = open_for_reading(extent.path, "copy it again")
        self._samples = self._file[extent.name]

    def read(self, first: int, last: int, into: memoryview) -> None:
        """See `Reader`. One call of HDF5 per unit."""
        dtype, shape = self._extent.dtype, self._samples.shape[1:]
        row_bytes = dtype.itemsize * math.prod(shape)
        rows = (self._extent.unit_bounds[first : last + 1] // row_bytes).tolist()
        samples = np.frombuffer(into, dtype).reshape(rows[-1] - rows[0], -1)
        for start, stop in pairwise(rows):
            part = samples[start - rows[0] : stop - rows[0]]
            try:
                if self._extent.channels_first:
                    planes = self._samples[start:stop]
                    part.reshape(len(part), *shape[1:], shape[0])[:] = np.moveaxis(planes, 1, 3)
                else:
                    self._samples.read_direct(part.reshape(len(part), *shape), np.s_[start:stop])
            except OSError as error:
                raise ValueError(
                    f"{self._extent.path}: samples {start}..{stop - 1} of /{self._extent.name} cannot be read ({error}); "
                    "copy the file again"
                ) from error

    def close(self) -> None:
        """See `Reader`."""
        self._file.close()


@dataclass(frozen=True, eq=False)
class Found:
    """A data set that was found in a file.

    Attributes:
        extent: its samples; its path is the named file's, also where `holder` says otherwise.
        dtype: type of its numbers as they are read; little-endian.
        shape: its shape; the first axis counts the samples.
        address: where it is in the file that holds it; by it a data set is known that is reached in two ways.
        fill: the number that HDF5 gives where nothing was written.
        holder: that file, if it is not the named one: an absolute path, or one from the directory of the named file.
        parts: (file as `holder`, address) of the data sets that a virtual one is put together from.
    """

    extent: Contiguous
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    address: int
    fill: Any
    holder: str | None = None
    parts: tuple[tuple[str, int], ...] = ()


def unit_bounds(rows: int, row_bytes: int, multiple: int, least_bytes: int) -> NDArray[np.int64]:
    """Bounds, in bytes, of units of a multiple of `multiple` rows and at least `least_bytes`; the last may be smaller."""
    step = multiple * -(-least_bytes // (multiple * row_bytes))
    return np.append(np.arange(0, rows, step, dtype=np.int64), rows) * row_bytes
