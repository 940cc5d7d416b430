"""Where the bytes of the shards lie while they are read: in memory, mapped where they are, or streamed through a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hvdlocal.communicator.agreement import succeed_together
from hvdlocal.communicator.base import Communicator
from hvdlocal.data.format.extent import Unmappable
from hvdlocal.data.read.storage.base import BLOCK_BYTES, ClosedStorage, Layout, Storage
from hvdlocal.data.read.storage.mapped import MappedStorage
from hvdlocal.data.read.storage.ram import RamStorage, Region
from hvdlocal.data.read.storage.select import choose, size_text
from hvdlocal.data.read.storage.stream import StreamStorage, least_capacity

__all__ = ["ClosedStorage", "Layout", "Region", "Storage", "open_storages"]


def open_storages(
    layouts: Sequence[Layout],
    storage: str,
    communicator: Communicator,
    share: str = "node",
    stream_bytes: int | None = None,
    regions: Sequence[Region] = (),
) -> list[Storage]:
    """Opens the storage that was asked for, or the one that fits, for each column of the samples; a collective.

    Args:
        layouts: what to hold, column by column.
        storage: "ram", "mmap", "stream" or "auto", which is the first of these that fits: `ram` up to half of the memory
            that the node can give, then `mmap` on local file systems.
        communicator: the ranks that read the same split.
        share: who reads the shards for mode "ram", see `RamStorage`.
        stream_bytes: what mode "stream" may hold in this process; a quarter of the free memory over the ranks of the
            node unless given. The columns divide it by their sizes.
        regions: where another process of this node may hold the same columns in memory; then nothing is chosen or read.
            For one process alone.

    Raises:
        ValueError: the choice is impossible, too little may be held of what is streamed, or a file is not what it should be;
            on every rank.
        OSError: a file cannot be read.
    """
    if share not in ("node", "job"):
        raise ValueError(f"share is {share!r}; choose 'node' or 'job'")

    def check() -> None:
        if stream_bytes is not None and stream_bytes < 1:
            raise ValueError(
                f"stream_bytes is {stream_bytes}; choose at least 1, or None for a quarter of the free memory"
            )

    succeed_together(communicator, check, "hvdlocal.data.stream_bytes")  # each rank may have its own
    if regions:
        # Before anything is chosen: memory that is shared already needs no room.
        with contextlib.suppress(OSError):  # its process is gone, or on another node
            reason = "shared with the process that opened the data set"
            return [
                RamStorage(layout, reason, communicator, region=region)
                for layout, region in zip(layouts, regions, strict=True)
            ]
    path, obstacle = layouts[0].extents[0].path, None
    for extent in (extent for layout in layouts for extent in layout.extents):
        if isinstance(extent, Unmappable):
            path, obstacle = extent.path, extent.obstacle
            break
    total = sum(layout.total_bytes for layout in layouts)
    choice = choose(storage, total, path, obstacle, communicator)
    if choice.mode == "ram":
        return [RamStorage(layout, choice.reason, communicator, share) for layout in layouts]
    room = choice.stream_bytes if stream_bytes is None else stream_bytes

    def open_files() -> list[Storage]:
        if choice.mode == "mmap":
            return [MappedStorage(layout, choice.reason) for layout in layouts]
        if obstacle is not None:
            _refuse_large_blocks(layouts, path, room)
        return [StreamStorage(layout, choice.reason, room * layout.total_bytes // total) for layout in layouts]

    return succeed_together(communicator, open_files, "hvdlocal.data.open")


def _refuse_large_blocks(layouts: Sequence[Layout], path: Path, room: int) -> None:
    """Refuses to stream what can only be unpacked in large pieces, such as chunks that reach over many samples."""
    largest = [int(np.diff(layout.block_bounds).max()) for layout in layouts]
    needed = sum(map(least_capacity, largest))
    if max(largest) > 2 * BLOCK_BYTES and needed > room:
        raise ValueError(
            f"samples in {path} can only be unpacked {size_text(max(largest))} at a time, so that each process must hold "
            f"{size_text(needed)} to stream them, and it may hold {size_text(room)}; write them as shards (python -m data_prep "
            "arrays), or give the process more memory"
        )
