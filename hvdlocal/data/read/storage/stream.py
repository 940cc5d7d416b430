"""Shards that are read while they are used: a bounded cache of large blocks, filled ahead by threads."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import OrderedDict, deque

import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.errors import DamagedDataError
from hvdlocal.data.format.extent import Reader, open_reader
from hvdlocal.data.read.storage.base import Layout, Storage

NUM_THREADS = 4
_READ_TIMEOUT_SECONDS = 600.0
_STOP_TIMEOUT_SECONDS = 5.0


def least_capacity(largest_block: int) -> int:
    """Bytes that must be held: every thread reads a block while another waits to be used."""
    return 2 * NUM_THREADS * largest_block


class StreamStorage(Storage):
    """Blocks of 1 to 2 MiB of consecutive samples, each read at once, checked on arrival and kept as long as there is room.

    Blocks are read by a few threads: first those that somebody waits for, then those that were announced by
    `read_ahead`, in that order. The least recently used go first. Announced blocks that were not used yet fill no more
    than half of the room; so two windows of an order fit if the room is twice a window.

    Args:
        layout: what to read.
        reason: see `Storage`.
        capacity_bytes: how much may be held; `least_capacity` at least.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is too short.
        OSError: a file cannot be opened. Every file stays open until `close`.
    """

    mode = "stream"

    def __init__(self, layout: Layout, reason: str, capacity_bytes: int) -> None:
        super().__init__(layout, reason)
        largest = int(np.diff(layout.block_bounds).max())
        self.capacity_bytes = max(capacity_bytes, least_capacity(largest))
        self._cache = _Cache(layout, self.capacity_bytes)
        # The threads know the cache only, so that a storage that nobody holds any more takes them with it.
        self._finalizer = weakref.finalize(self, self._cache.stop)

    def gather(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """See `Storage`."""
        size = self.layout.sample_bytes
        assert size is not None
        blocks = np.searchsorted(self.layout.block_starts, rows, side="right") - 1
        order = np.argsort(blocks, kind="stable")
        wanted, begins = np.unique(blocks[order], return_index=True)
        parts = np.split(order, begins[1:])
        at_once = max(1, self.capacity_bytes // 2 // int(np.diff(self.layout.block_bounds).max()))
        for i in range(0, len(wanted), at_once):
            some = wanted[i : i + at_once].tolist()
            for block, data, part in zip(some, self._cache.get(some), parts[i : i + at_once], strict=True):
                images = data.reshape(-1, size)
                out[part] = images[rows[part].astype(np.int64) - self.layout.block_starts[block]]

    def view(self, start: int, stop: int) -> memoryview:
        """See `Storage`."""
        block = int(np.searchsorted(self.layout.block_bounds, start, side="right")) - 1
        begin = int(self.layout.block_bounds[block])
        return self._cache.get([block])[0][start - begin : stop - begin].data

    def read_ahead(self, samples: NDArray[np.int64]) -> None:
        """See `Storage`."""
        blocks = np.searchsorted(self.layout.block_starts, samples, side="right") - 1
        unique, first = np.unique(blocks, return_index=True)
        self._cache.announce(unique[np.argsort(first)].tolist())

    def close(self) -> None:
        """See `Storage`."""
        self._finalizer.detach()
        self._cache.stop()
        self._cache.join()


class _Entry:
    """A block that is wanted, being read, or here."""

    __slots__ = ("ahead", "block", "data", "done", "error", "size", "started")

    def __init__(self, block: int, size: int, *, ahead: bool) -> None:
        self.block = block
        self.size = size
        self.ahead = ahead  # announced, and not used yet
        self.started = False
        self.done = False
        self.data: NDArray[np.uint8] | None = None
        self.error: Exception | None = None


class _Cache:
    """The blocks in memory, and the threads that read them."""

    def __init__(self, layout: Layout, capacity: int) -> None:
        self._layout = layout
        self._capacity = capacity
        self._readers: list[Reader] = []
        try:
            for extent in layout.extents:
                self._readers.append(open_reader(extent, sequential=False))
        except BaseException:
            self._close_files()
            raise
        self._start_afresh()
        _caches.add(self)

    def _start_afresh(self) -> None:
        self._process = os.getpid()
        # Its lock is re-entrant, and must be: a garbage collection may call `stop` while this thread is inside.
        self._changed = threading.Condition()
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # least recently used first
        self._urgent: deque[_Entry] = deque()
        self._announced: deque[_Entry] = deque()
        self._held = 0  # bytes of blocks that are here
        self._ahead = 0  # bytes of blocks that are here or on their way, and not used yet
        self._threads: list[threading.Thread] = []
        self._running = 0
        self._stopped = False

    def get(self, blocks: list[int]) -> list[NDArray[np.uint8]]:
        """The bytes of the given blocks; waits for those that are not here."""
        self._check_process()
        with self._changed:
            entries = [self._demand(block) for block in blocks]
            self._start_threads()
            self._changed.notify_all()
            deadline = time.monotonic() + _READ_TIMEOUT_SECONDS
            while not all(entry.done for entry in entries):
                if self._stopped:
                    raise ValueError("the data set was closed while it was read")
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"{self._describe(entries)} were not read within {_READ_TIMEOUT_SECONDS:.0f} s; "
                        "the file system does not answer"
                    )
                self._changed.wait(1)  # wakes up now and then so that signals are seen
        for entry in entries:
            if entry.error is not None:
                kind = next((kind for kind in (OSError, DamagedDataError) if isinstance(entry.error, kind)), ValueError)
                raise kind(f"{self._describe([entry])} cannot be read: {entry.error}") from entry.error
        return [entry.data for entry in entries if entry.data is not None]

    def announce(self, blocks: list[int]) -> None:
        """Reads these blocks when there is time and room."""
        self._check_process()
        with self._changed:
            for block in blocks:
                if block not in self._entries:
                    self._entries[block] = entry = _Entry(block, self._size(block), ahead=True)
                    self._announced.append(entry)
            self._start_threads()
            self._changed.notify_all()

    def stop(self) -> None:
        """Lets the threads end; the last of them closes the files."""
        with self._changed:
            already, self._stopped = self._stopped, True
            self._changed.notify_all()
            if not already and not self._running:
                self._close_files()

    def join(self) -> None:
        """Waits some seconds for the threads."""
        for thread in self._threads:
            thread.join(_STOP_TIMEOUT_SECONDS)

    def _demand(self, block: int) -> _Entry:
        entry = self._entries.get(block)
        if entry is None:
            self._entries[block] = entry = _Entry(block, self._size(block), ahead=False)
            self._urgent.append(entry)
            return entry
        self._entries.move_to_end(block)
        if entry.ahead:
            entry.ahead = False
            if entry.started:
                self._ahead -= entry.size
            else:
                self._urgent.append(entry)
        return entry

    def _start_threads(self) -> None:
        if self._stopped:
            raise ValueError("the data set was closed; open it again")
        while len(self._threads) < NUM_THREADS:
            thread = threading.Thread(target=self._work, name="hvdlocal-stream", daemon=True)
            self._threads.append(thread)
            self._running += 1
            thread.start()

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            try:
                data = np.empty(entry.size, np.uint8)
                self._read(entry.block, data)
                data.flags.writeable = False
                entry.data = data
            except Exception as error:  # it belongs to whoever wants the block
                entry.error = error
            self._arrived(entry)
        with self._changed:
            self._running -= 1
            if not self._running:
                self._close_files()

    def _next(self) -> _Entry | None:
        with self._changed:
            while not self._stopped:
                if self._urgent:
                    entry = self._urgent.popleft()
                elif self._announced and (
                    not self._announced[0].ahead or self._ahead + self._announced[0].size <= self._capacity // 2
                ):
                    entry = self._announced.popleft()
                else:
                    self._changed.wait()
                    continue
                if not entry.started:
                    entry.started = True
                    self._ahead += entry.size * entry.ahead
                    return entry
        return None

    def _read(self, block: int, data: NDArray[np.uint8]) -> None:
        layout = self._layout
        start, stop = np.searchsorted(layout.unit_starts, layout.block_bounds[block : block + 2]).tolist()
        for number, first, last in layout.units_between(start, stop):  # there is one
            self._readers[number].read(first, last, data.data)

    def _arrived(self, entry: _Entry) -> None:
        with self._changed:
            entry.done = True
            if entry.error is not None:  # whoever waits for it has it; who comes later may try again
                self._entries.pop(entry.block, None)
                self._ahead -= entry.size * entry.ahead
            else:
                self._held += entry.size
                self._entries.move_to_end(entry.block)
                self._make_room(entry)
            self._changed.notify_all()

    def _make_room(self, arrived: _Entry) -> None:
        for entry in list(self._entries.values()) if self._held > self._capacity else ():
            if self._held <= self._capacity:
                break
            if entry.done and entry is not arrived:
                del self._entries[entry.block]
                self._held -= entry.size
                self._ahead -= entry.size * entry.ahead

    def _size(self, block: int) -> int:
        return int(self._layout.block_bounds[block + 1] - self._layout.block_bounds[block])

    def _describe(self, entries: list[_Entry]) -> str:
        waited = [entry.block for entry in entries if not entry.done or entry.error is not None]
        starts = self._layout.block_starts
        return f"samples {starts[min(waited)]}..{starts[max(waited) + 1] - 1} of the split"

    def _check_process(self) -> None:
        if self._process != os.getpid():  # a child of a fork has the files, but neither the threads nor their news
            self._start_afresh()

    def _close_files(self) -> None:
        while self._readers:
            self._readers.pop().close()


_caches: weakref.WeakSet[_Cache] = weakref.WeakSet()


@atexit.register
def _stop_threads() -> None:
    # A thread inside a system call while the interpreter is torn down can crash the process on its way out.
    for cache in list(_caches):
        cache.stop()
        cache.join()
