"""Memory of collectives that can be repeated."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Undo:
    """Copies of memory that a collective has overwritten.

    Memory is replaced piece by piece, while the piece is in the cache. The copies' own memory is kept, for the next collective.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)
        self._used = 0
        self._replaced: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self._final = False
        self._lock = threading.Lock()

    def reserve(self, nbytes: int) -> None:
        """Makes room for copies of so many bytes; nothing may have been replaced."""
        assert not self._replaced
        if nbytes > len(self._memory):
            self._memory = np.empty(nbytes, dtype=np.uint8)

    def replace(self, piece: NDArray[Any], values: NDArray[Any]) -> None:
        """Overwrites a contiguous piece; pieces of one collective have one dtype.

        Raises:
            RuntimeError: `give_up` has been called.
        """
        with self._lock:
            if self._final:
                raise RuntimeError("it has been given up")
            copy = self._memory[self._used : self._used + piece.nbytes].view(piece.dtype)
            np.copyto(copy, piece)
            np.copyto(piece, values)
            self._used += piece.nbytes
            self._replaced.append((piece, copy))

    def roll_back(self) -> None:
        """Restores what was replaced, and forgets it."""
        with self._lock:
            for piece, copy in self._replaced:
                np.copyto(piece, copy)
            self._forget()

    def give_up(self) -> None:
        """Restores what was replaced, from another thread than that of the collectives; nothing can be replaced any more."""
        with self._lock:
            self._final = True
        self.roll_back()

    def forget(self) -> None:
        """Makes what was replaced final."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._replaced.clear()
        self._used = 0


class MessageMemory:
    """The memory of messages. MPI uses no other, since it may still do so after a collective has failed.

    A message that comes late would overwrite what a repeated collective has received, or memory that has been freed. So what has
    been used by a collective that failed is neither used again nor freed.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)
        self._outgrown: list[NDArray[np.uint8]] = []
        self._abandoned: list[NDArray[np.uint8]] = []

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """Returns memory of so many bytes, for one message."""
        if nbytes > len(self._memory):
            self._outgrown.append(self._memory)
            self._memory = np.empty(nbytes, dtype=np.uint8)
        return self._memory[:nbytes]

    def reuse(self) -> None:
        """Ends the use of what has been given, after a collective that has succeeded."""
        self._outgrown.clear()

    def abandon(self) -> None:
        """Ends the use of what has been given, after a collective that has failed."""
        self._abandoned += [*self._outgrown, self._memory]
        self._outgrown.clear()
        self._memory = np.empty(0, dtype=np.uint8)
