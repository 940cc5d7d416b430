"""Memory of collectives that can be repeated."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

KEPT_BYTES = 2**20
"""The longest memory of messages that is kept for the next collective."""


class Undo:
    """Copies of memory that a collective overwrites, from its beginning on.

    A piece is copied just before it is overwritten, so that the collective finds it in the cache: together they are as fast as a
    collective from one buffer into another. The copies' own memory is kept, for the next collective.
    """

    def __init__(self) -> None:
        self._copies = np.empty(0, dtype=np.uint8)
        self._whole = np.empty(0, dtype=np.uint8)
        self._saved = 0

    def begin(self, memory: NDArray[Any]) -> None:
        """Prepares for a collective that overwrites contiguous memory."""
        if memory.nbytes > len(self._copies):
            self._copies = np.empty(memory.nbytes, dtype=np.uint8)
        self._whole = memory.view(np.uint8)
        self._saved = 0

    def save(self, nbytes: int) -> None:
        """Copies the next so many bytes."""
        piece = slice(self._saved, self._saved + nbytes)
        np.copyto(self._copies[piece], self._whole[piece])
        self._saved += nbytes

    def original(self, out: NDArray[np.uint8]) -> None:
        """Writes into `out` what the whole memory was; it does not rely on what has been overwritten or restored."""
        out[: self._saved] = self._copies[: self._saved]
        out[self._saved :] = self._whole[self._saved :]

    def roll_back(self) -> None:
        """Restores what was overwritten."""
        self._whole[: self._saved] = self._copies[: self._saved]

    def forget(self) -> None:
        """Makes what was overwritten final."""
        self._whole = self._whole[:0]
        self._saved = 0


class MessageMemory:
    """Memory that MPI may still use after a collective has failed.

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
        if len(self._memory) > KEPT_BYTES:
            self._memory = np.empty(0, dtype=np.uint8)

    def abandon(self) -> None:
        """Ends the use of what has been given, after a collective that has failed."""
        self._abandoned += [*self._outgrown, self._memory]
        self._outgrown.clear()
        self._memory = np.empty(0, dtype=np.uint8)
