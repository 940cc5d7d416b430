"""Where the bytes of the shards lie while they are read: in memory, mapped where they are, or streamed through a cache."""

from __future__ import annotations

import contextlib

from hvdlocal.communicator.agreement import succeed_together
from hvdlocal.communicator.base import Communicator
from hvdlocal.data.format.extent import Unmappable
from hvdlocal.data.read.storage.base import ClosedStorage, Layout, Storage
from hvdlocal.data.read.storage.mapped import MappedStorage
from hvdlocal.data.read.storage.ram import RamStorage, Region
from hvdlocal.data.read.storage.select import choose
from hvdlocal.data.read.storage.stream import StreamStorage

__all__ = ["ClosedStorage", "Layout", "Region", "Storage", "open_storage"]


def open_storage(
    layout: Layout,
    storage: str,
    communicator: Communicator,
    share: str = "node",
    stream_bytes: int | None = None,
    region: Region | None = None,
) -> Storage:
    """Opens the storage that was asked for, or the one that fits; a collective.

    Args:
        layout: what to hold.
        storage: "ram", "mmap", "stream" or "auto", which is the first of these that fits: `ram` up to half of the memory
            that the node can give, then `mmap` on local file systems.
        communicator: the ranks that read the same split.
        share: who reads the shards for mode "ram", see `RamStorage`.
        stream_bytes: what mode "stream" may hold in this process; a quarter of the free memory over the ranks of the
            node unless given.
        region: where another process of this node may hold the same data in memory; then nothing is chosen or read. For
            one process alone.

    Raises:
        ValueError: the choice is impossible, or a file is not what it should be; on every rank.
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
    if region is not None:
        # Before anything is chosen: memory that is shared already needs no room.
        with contextlib.suppress(OSError):  # its process is gone, or on another node
            return RamStorage(layout, "shared with the process that opened the data set", communicator, region=region)
    path, obstacle = layout.extents[0].path, None
    for extent in layout.extents:
        if isinstance(extent, Unmappable):
            path, obstacle = extent.path, extent.obstacle
            break
    choice = choose(storage, layout.total_bytes, path, obstacle, communicator)
    if choice.mode == "ram":
        return RamStorage(layout, choice.reason, communicator, share)

    def open_files() -> Storage:
        if choice.mode == "mmap":
            return MappedStorage(layout, choice.reason)
        return StreamStorage(layout, choice.reason, choice.stream_bytes if stream_bytes is None else stream_bytes)

    return succeed_together(communicator, open_files, "hvdlocal.data.open")
