"""Ranks that hang are found and ended by the other ranks of their node.

MPI notices a process that has died, but not one that is stopped or works for ever. A rank that has waited for too long kills the
ranks of its node that are to blame; then they have died.
"""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

SLOT = np.dtype([("pid", np.int64), ("entered", np.int64, 2), ("waits", np.int64), ("beat", np.float64)])
"""Of one rank: its process, the collectives it has entered, whether it waits for one, and when it was last seen to run.

The collectives of all ranks are counted apart from those inside of an island, of which other islands may have more.
"""


class NodeBoard:
    """What the ranks of a node show each other, in memory that they share.

    Args:
        file: of `size` slots, the same for all ranks of the node; it can be removed afterwards.
        place: that of this rank among them.
        size: number of ranks on the node.
        patience: after how many seconds without a sign of life a rank is taken for stopped.
    """

    def __init__(self, file: Path, place: int, size: int, patience: float) -> None:
        with file.open("r+b") as opened:
            self._slots = np.frombuffer(mmap.mmap(opened.fileno(), size * SLOT.itemsize), SLOT)
        self._mine = self._slots[place : place + 1]
        self._mine["pid"] = os.getpid()
        self._patience = patience
        self._closed = threading.Event()
        self._show_life()
        threading.Thread(target=self._beat, name="hvdlocal-heartbeat", daemon=True).start()

    def enter(self, inside: bool) -> int:
        """Shows that this rank has come to its next collective, and returns the collective's number.

        Args:
            inside: whether it is one inside of an island.
        """
        self._mine["entered"][0, int(inside)] += 1
        return int(self._mine["entered"][0, int(inside)])

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Shows meanwhile that this rank waits for others; a rank that does so is not to blame for being behind."""
        self._mine["waits"] = 1
        try:
            yield
        finally:
            self._mine["waits"] = 0

    def kill_hung(self, places: Iterable[int], collective: int, inside: bool) -> list[int]:
        """Kills the ranks that a collective waits for.

        Args:
            places: those of the ranks of the node that have not died, without this one.
            collective: its number.
            inside: whether it is one inside of an island.

        Returns:
            The places of those that were killed: ranks that do not run, and ranks that have not come to the collective although
            they wait for nobody.
        """
        now = time.monotonic()  # one clock for all processes of a node
        hung = [
            place
            for place in places
            if now - self._slots[place]["beat"] > self._patience
            or (self._slots[place]["entered"][int(inside)] < collective and not self._slots[place]["waits"])
        ]
        for place in hung:
            with suppress(ProcessLookupError):
                os.kill(int(self._slots[place]["pid"]), signal.SIGKILL)
        return hung

    def close(self) -> None:
        """Ends the signs of life."""
        self._closed.set()

    def _show_life(self) -> None:
        self._mine["beat"] = time.monotonic()

    def _beat(self) -> None:
        while not self._closed.wait(min(1.0, self._patience / 4)):
            self._show_life()


def open_board(node: Any, patience: float) -> NodeBoard:
    """Makes the board of a node; a collective of its ranks.

    Args:
        node: MPI's communicator of them.
        patience: as for `NodeBoard`.
    """
    # It has no name in a file system, so that nothing is left of it when ranks are killed.
    descriptor = os.memfd_create("hvdlocal-ranks", os.MFD_CLOEXEC) if node.rank == 0 else -1
    if node.rank == 0:
        os.ftruncate(descriptor, node.size * SLOT.itemsize)
    file = node.bcast(Path(f"/proc/{os.getpid()}/fd/{descriptor}"))
    board = NodeBoard(file, node.rank, node.size, patience)
    node.Barrier()
    if node.rank == 0:
        os.close(descriptor)
    return board
