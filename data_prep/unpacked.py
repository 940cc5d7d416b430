"""Arrays that do not lie in their files as they are, unpacked once: samples are then read in any order at the speed of the disk.

A writer takes the samples of a shard from everywhere in the source. From compressed chunks that would unpack every chunk once
for each shard, or more often.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from hvdlocal.communicator import Communicator, succeed_together
from hvdlocal.data.format.extent import Unmappable, open_reader
from hvdlocal.data.read.foreign_extents import Contiguous
from hvdlocal.directory import Directory
from hvdlocal.lock import hold

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
    units = len(extent.unit_bounds) - 1
    first, last = (units * part // communicator.size for part in (communicator.rank, communicator.rank + 1))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    reader = open_reader(extent)
    try:
        for unit in range(first, last):
            start, stop = extent.unit_bounds[unit : unit + 2].tolist()
            content = np.empty(stop - start, np.uint8)
            reader.read(unit, unit + 1, content.data)
            left = content.data
            while left:
                left = left[os.pwrite(descriptor, left, stop - len(left)) :]
    finally:
        reader.close()
        os.close(descriptor)
    return Contiguous(path, 0, extent.data_bytes, extent.unit_bounds)
