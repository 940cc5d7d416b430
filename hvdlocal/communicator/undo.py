"""What collectives in place have overwritten, so that they can be repeated."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Undo:
    """Copies of memory that is about to be overwritten.

    A copy is made piece by piece, so that the collective finds the piece in the cache: together they are as fast as a collective
    from one buffer into another. The copies' own memory is kept, for the next collective.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)
        self._used = 0
        self._saved: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def reserve(self, nbytes: int) -> None:
        """Makes room for copies of so many bytes; nothing may be saved then."""
        assert not self._saved
        if nbytes > len(self._memory):
            self._memory = np.empty(nbytes, dtype=np.uint8)

    def save(self, piece: NDArray[Any]) -> None:
        """Copies a contiguous piece; pieces of one collective have one dtype."""
        copy = self._memory[self._used : self._used + piece.nbytes].view(piece.dtype)
        np.copyto(copy, piece)
        self._used += piece.nbytes
        self._saved.append((piece, copy))

    def roll_back(self) -> None:
        """Writes back what was saved, and forgets it."""
        for piece, copy in self._saved:
            np.copyto(piece, copy)
        self.forget()

    def forget(self) -> None:
        """Makes what was overwritten final."""
        self._saved.clear()
        self._used = 0
