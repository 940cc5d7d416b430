"""Arrays that do not lie in their files as they are, unpacked once: samples are then read in any order at the speed of the disk.

A writer takes the samples of a shard from everywhere in the source. From compressed chunks that would unpack every chunk once
for each shard, or more often.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from hvdlocal.communicator import Communicator, succeed_together
from hvdlocal.data.format.extent import Unmappable, open_reader
from hvdlocal.data.format.hdf5 import open_for_reading
from hvdlocal.data.read.foreign_extents import Contiguous, Packed
from hvdlocal.directory import Directory
from hvdlocal.lock import hold

HELD_BYTES = 256 << 20
"""Memory of a rank while it unpacks an HDF5 file, unless one chunk is larger."""

_LOCK = ".lock"


def unpack(
    columns: Sequence[Sequence[Contiguous]], folder: Path, communicator: Communicator
) -> tuple[list[list[Contiguous]], Callable[[], None]]:
    """Copies what must be unpacked to files of its own; a collective, in which the ranks share the work.

    Args:
        columns: for each array, where it lies in each file.
        folder: directory for the copies, which is made if any is needed.
        communicator: the ranks.

    Returns:
        The same with the copies in the place of what was unpacked, and a function that removes the directory.

    Raises:
        FileExistsError: another process uses the directory.
        OSError, ValueError: a file cannot be read or written; on every rank.
    """
    if not any(isinstance(extent, Unmappable) for extents in columns for extent in extents):
        return [list(extents) for extents in columns], lambda: None
    lock = succeed_together(communicator, lambda: _claim(folder) if communicator.rank == 0 else None, "data.unpacked")

    def remove() -> None:
        if lock is not None:
            shutil.rmtree(folder)
            lock.close()
            with contextlib.suppress(OSError):  # the data set's directory, unless something is in it
                folder.parent.rmdir()

    def copy() -> list[list[Contiguous]]:
        return [
            [_copy(extent, folder / f"{column}-{number}", communicator) for number, extent in enumerate(extents)]
            for column, extents in enumerate(columns)
        ]

    try:
        return succeed_together(communicator, copy, "data.unpack"), remove
    except BaseException:
        remove()
        raise


def _claim(folder: Path) -> IO[bytes]:
    """Makes an empty directory, which no other process uses until the returned lock is closed."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with Directory(folder) as directory:
            lock = hold(directory, _LOCK)
    except BlockingIOError as error:
        raise FileExistsError(
            f"{folder} is used by another process ({error}); wait for it, or choose another directory"
        ) from None
    for path in folder.iterdir():  # what a run left that was killed
        if path.name != _LOCK:
            path.unlink()
    return lock


def _copy(extent: Contiguous, path: Path, communicator: Communicator) -> Contiguous:
    """Copies this rank's part of an extent, unless it needs no copy."""
    if not isinstance(extent, Unmappable):
        return extent
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        (_copy_boxes if isinstance(extent, Packed) else _copy_units)(extent, descriptor, communicator)
    finally:
        os.close(descriptor)
    return Contiguous(path, 0, extent.data_bytes, extent.unit_bounds)


def _copy_units(extent: Contiguous, descriptor: int, communicator: Communicator) -> None:
    """Copies an array that is unpacked from its beginning on."""
    units = len(extent.unit_bounds) - 1
    first, last = (units * part // communicator.size for part in (communicator.rank, communicator.rank + 1))
    reader = open_reader(extent)
    try:
        for unit in range(first, last):
            start, stop = extent.unit_bounds[unit : unit + 2].tolist()
            content = np.empty(stop - start, np.uint8)
            reader.read(unit, unit + 1, content.data)
            _write(descriptor, content.data, start)
    finally:
        reader.close()


def _copy_boxes(extent: Packed, descriptor: int, communicator: Communicator) -> None:
    """Copies an array of an HDF5 file box by box, each of whole chunks, and writes the runs of numbers to their places."""
    with open_for_reading(extent.path, "copy it again") as file:
        samples = file[extent.name]
        shape, item = samples.shape, extent.dtype.itemsize
        box = _box(shape, samples.chunks, item)
        strides = [item * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        whole = next((axis for axis in reversed(range(len(shape))) if box[axis] < shape[axis]), 0)  # a run begins here
        corners = list(itertools.product(*(range(0, size, step) for size, step in zip(shape, box, strict=True))))
        first, last = (len(corners) * part // communicator.size for part in (communicator.rank, communicator.rank + 1))
        for corner in corners[first:last]:
            ends = [min(begin + step, size) for begin, step, size in zip(corner, box, shape, strict=True)]
            content = np.empty([end - begin for begin, end in zip(corner, ends, strict=True)], extent.dtype)
            try:
                samples.read_direct(content, tuple(map(slice, corner, ends)))
            except OSError as error:
                raise ValueError(
                    f"{extent.path}: samples {corner[0]}..{ends[0] - 1} of /{extent.name} cannot be read ({error}); copy the "
                    "file again"
                ) from error
            for index in np.ndindex(content.shape[:whole]):
                offsets = [*index, *(0,) * (len(shape) - whole)]
                place = sum(
                    stride * (begin + offset) for stride, begin, offset in zip(strides, corner, offsets, strict=True)
                )
                _write(descriptor, memoryview(content[index].reshape(-1).view(np.uint8)), place)


def _box(shape: Sequence[int], chunks: Sequence[int] | None, item_bytes: int) -> list[int]:
    """The shape of a box of whole chunks, of at most `HELD_BYTES` unless a chunk is larger; it grows from the last axis on."""
    box = [min(chunk, size) for chunk, size in zip(chunks or (1,) * len(shape), shape, strict=True)]
    for axis in reversed(range(len(shape))):
        times = max(1, HELD_BYTES // (item_bytes * math.prod(box)))
        box[axis] = min(box[axis] * times, shape[axis])
    return box


def _write(descriptor: int, content: memoryview, place: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, place)
        content, place = content[written:], place + written
