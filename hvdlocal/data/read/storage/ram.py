"""All shards in memory: one copy per node, staged with large sequential reads."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import warnings
import weakref
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from hvdlocal.communicator.agreement import succeed_together
from hvdlocal.communicator.base import Communicator
from hvdlocal.data.format.extent import Reader, open_reader
from hvdlocal.data.read.storage.base import Layout, Storage
from hvdlocal.data.read.storage.select import Node, size_text, this_node

_BROADCAST_BYTES = 64 << 20  # one piece on its way through the network
_ROUND_BYTES = 1 << 30  # what a rank reads between two meetings, so that no rank waits in vain for long

# fcntl's names are missing from older Pythons.
_ADD_SEALS, _NO_MORE_SEALS, _NO_SHRINKING, _NO_GROWING, _NO_WRITING = 1033, 1, 2, 4, 8


@dataclass(frozen=True)
class Region:
    """Memory without a name that other processes of the node can open while its descriptor is open.

    Attributes:
        node: where it is.
        process, descriptor: whose, and its number there.
        device, inode: identify it.
    """

    node: Node
    process: int
    descriptor: int
    device: int
    inode: int

    def open(self) -> int:
        """Opens a descriptor of this process. Raises OSError when this process must not, or it is gone."""
        if self.node != this_node():
            raise OSError("it is on another machine, or in another container")
        descriptor = os.open(f"/proc/{self.process}/fd/{self.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        found = os.fstat(descriptor)
        if (found.st_dev, found.st_ino) != (self.device, self.inode):
            os.close(descriptor)
            raise OSError("it is gone")
        return descriptor


class RamStorage(Storage):
    """All data in one piece of memory, every checksum compared on the way there.

    Args:
        layout: what to hold.
        reason: see `Storage`.
        communicator: the ranks that share copies; the copy of a single rank is private.
        share: "node": each node reads all shards, its ranks in parallel; "job": one rank of the job reads a shard and
            broadcasts it.
        region: where another process of this node holds the same data already; then nothing is read.

    With several ranks this is a collective. Shared memory is a memfd: it has no name, so nothing is left of it when its
    processes are gone, however they ended.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is too short, or a checksum is wrong. (Over several ranks, SetupError on every one.)
        OSError: the region cannot be opened.
    """

    mode = "ram"

    def __init__(
        self,
        layout: Layout,
        reason: str,
        communicator: Communicator,
        share: str = "node",
        region: Region | None = None,
    ) -> None:
        super().__init__(layout, reason)
        self.region: Region | None = None
        self._descriptor: int | None = None  # stays open for processes that unpickle a data set
        if communicator.size > 1:
            self._memory = self._stage_together(communicator, share)
        elif region is not None:
            self._memory = self._opened(region)
        else:
            self._memory = succeed_together(communicator, self._stage_alone, "hvdlocal.data.stage")
        if layout.sample_bytes is not None:
            self._images = self._memory.reshape(-1, layout.sample_bytes)

    def gather(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """See `Storage`."""
        self._images.take(rows, 0, out, "clip")  # "raise" would go through a buffer

    def view(self, start: int, stop: int) -> memoryview:
        """See `Storage`."""
        return self._memory[start:stop].data

    def close(self) -> None:
        """See `Storage`. The memory is released with the last reader and the last view of it."""
        if self._descriptor is not None:
            self._close_descriptor()

    def _stage_alone(self) -> NDArray[np.uint8]:
        memory = mmap.mmap(-1, self.layout.total_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)  # a gather from everywhere in it would miss the TLB with every sample
        with memoryview(memory) as view:
            _stage(self.layout, 0, len(self.layout.unit_starts) - 1, view)
        return _read_only(memory)

    def _opened(self, region: Region) -> NDArray[np.uint8]:
        self._descriptor = region.open()
        self._close_descriptor = weakref.finalize(self, os.close, self._descriptor)
        self.region = region
        return self._map()

    def _map(self) -> NDArray[np.uint8]:
        # Private, because older kernels let nobody map sealed memory otherwise; nothing is ever written through it, so
        # it stays one copy. Populated, because the first gathers would otherwise take a fault for every page.
        assert self._descriptor is not None
        flags = mmap.MAP_PRIVATE | mmap.MAP_POPULATE
        return _read_only(mmap.mmap(self._descriptor, self.layout.total_bytes, flags=flags, prot=mmap.PROT_READ))

    def _stage_together(self, communicator: Communicator, share: str) -> NDArray[np.uint8]:
        members = self._join(communicator)
        total = self.layout.total_bytes
        assert self._descriptor is not None
        self._close_descriptor = weakref.finalize(self, os.close, self._descriptor)
        memory = succeed_together(
            communicator, partial(mmap.mmap, self._descriptor, total, flags=mmap.MAP_SHARED), "hvdlocal.data.map"
        )
        view = memoryview(memory)
        if share == "job":
            _stage_job(self.layout, communicator, view if communicator.rank == members[0] else None)
        else:
            _stage_node(self.layout, communicator, view, members.index(communicator.rank), len(members))
        # Only now: a failure above has a traceback, which holds pieces of the view.
        view.release()
        memory.close()
        communicator.gather(None, "hvdlocal.data.staged")  # memory that anybody has mapped for writing cannot be sealed
        if communicator.rank == members[0]:
            with contextlib.suppress(OSError):  # a kernel that cannot; then nothing but good manners protects it
                seals = _NO_WRITING | _NO_SHRINKING | _NO_GROWING | _NO_MORE_SEALS
                fcntl.fcntl(self._descriptor, _ADD_SEALS, seals)
        return succeed_together(communicator, self._map, "hvdlocal.data.mapped")

    def _join(self, communicator: Communicator) -> list[int]:
        """Opens the memory of the first rank that can share it with this one; returns the ranks that have it open."""
        self._descriptor = succeed_together(communicator, self._create, "hvdlocal.data.memory")
        found = os.fstat(self._descriptor)
        mine = Region(this_node(), os.getpid(), self._descriptor, found.st_dev, found.st_ino)
        regions: list[Region] = communicator.gather(mine, "hvdlocal.data.regions")
        first = next(region for region in regions if region.node == mine.node)
        self.region = first
        if first != mine:
            try:
                descriptor = first.open()
            except OSError as error:
                self.region = mine
                warnings.warn(
                    f"{communicator.describe()} cannot open the data of rank {regions.index(first)} on the same node "
                    f"({error}); it holds a copy of its own, {size_text(self.layout.total_bytes)}. Mount /proc without "
                    "hidepid and run all ranks as one user in one container.",
                    stacklevel=2,
                )
            else:
                os.close(self._descriptor)
                self._descriptor = descriptor
        opened = communicator.gather(self.region, "hvdlocal.data.opened")
        return [rank for rank, region in enumerate(opened) if region == self.region]

    def _create(self) -> int:
        descriptor = os.memfd_create("hvdlocal-data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, self.layout.total_bytes)  # costs no memory before it is written
        return descriptor


def _read_only(memory: mmap.mmap) -> NDArray[np.uint8]:
    array = np.frombuffer(memory, np.uint8)
    array.flags.writeable = False
    return array


def _stage(layout: Layout, start: int, stop: int, memory: memoryview) -> None:
    """Reads the units start..stop-1, counted over all extents, to where they belong."""
    for number, first, last in layout.units_between(start, stop):
        extent = layout.extents[number]
        reader = open_reader(extent)
        try:
            _read(layout, number, first, last, reader, memory)
        finally:
            reader.close()


def _read(layout: Layout, number: int, first: int, last: int, reader: Reader, memory: memoryview) -> None:
    begin, end = _positions(layout, number, first, last)
    with memory[begin:end] as into:
        reader.read(first, last, into)


def _positions(layout: Layout, number: int, first: int, last: int) -> tuple[int, int]:
    bounds, base = layout.extents[number].unit_bounds, int(layout.bounds[number])
    return base + int(bounds[first]), base + int(bounds[last])


def _stage_node(layout: Layout, communicator: Communicator, memory: memoryview, number: int, members: int) -> None:
    """Each of `members` ranks reads an equal part; this one is the part `number`."""
    rounds = -(-layout.total_bytes // _ROUND_BYTES)
    for turn in range(rounds):
        part, parts = number * rounds + turn, members * rounds
        cuts = [layout.total_bytes * part // parts, layout.total_bytes * (part + 1) // parts]
        start, stop = np.searchsorted(layout.unit_starts, cuts).tolist()
        succeed_together(communicator, partial(_stage, layout, start, stop, memory), "hvdlocal.data.stage")


def _stage_job(layout: Layout, communicator: Communicator, memory: memoryview | None) -> None:
    """Each extent is read by one rank of the job; those with `memory` store it.

    As many extents as there are ranks are read at a time, a piece of each; then the pieces are broadcast.
    """
    pieces = [_pieces(extent.unit_bounds) for extent in layout.extents]
    largest = max(
        end - begin
        for number, cuts in enumerate(pieces)
        for begin, end in (_positions(layout, number, *cut) for cut in cuts)
    )
    mine_apart, theirs_apart = (np.empty(largest, np.uint8).data for _ in range(2))

    def place(number: int, step: int, apart: memoryview) -> memoryview:
        begin, end = _positions(layout, number, *pieces[number][step])
        return apart[: end - begin] if memory is None else memory[begin:end]

    for base in range(0, len(pieces), communicator.size):
        group = range(base, min(base + communicator.size, len(pieces)))
        mine = base + communicator.rank
        with contextlib.ExitStack() as stack:
            reader: Reader | None = None

            def read(step: int, mine: int = mine, stack: contextlib.ExitStack = stack) -> None:
                nonlocal reader
                if reader is None:
                    reader = open_reader(layout.extents[mine])
                    stack.callback(reader.close)
                with place(mine, step, mine_apart) as into:
                    reader.read(*pieces[mine][step], into)

            for step in range(max(len(pieces[number]) for number in group)):
                here = mine in group and step < len(pieces[mine])
                succeed_together(communicator, partial(read, step) if here else lambda: None, "hvdlocal.data.stage")
                for root, number in enumerate(group):
                    if step < len(pieces[number]):
                        apart = mine_apart if root == communicator.rank else theirs_apart
                        with place(number, step, apart) as piece:
                            tensor = torch.frombuffer(piece, dtype=torch.uint8)
                            communicator.broadcast_(tensor, "hvdlocal.data.broadcast", root)
                            del tensor  # it holds the memory


def _pieces(unit_bounds: NDArray[np.int64]) -> list[tuple[int, int]]:
    """The units of an extent in runs (first, last) of at most _BROADCAST_BYTES, or of one unit."""
    pieces, first, units = [], 0, len(unit_bounds) - 1
    while first < units:
        last = int(np.searchsorted(unit_bounds, unit_bounds[first] + _BROADCAST_BYTES, side="right")) - 1
        last = max(last, first + 1)
        pieces.append((first, last))
        first = last
    return pieces
