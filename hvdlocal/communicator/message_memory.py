"""Memory of collectives that can be repeated."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class MessageMemory:
    """The memory to which MPI writes: it may still do so after a collective has failed.

    A message that comes late would overwrite what a repeated collective has received, or memory that has been freed. So what has
    been used by a collective that failed is neither used again nor freed.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)
        self._outgrown: list[NDArray[np.uint8]] = []
        self._abandoned: list[NDArray[np.uint8]] = []

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """Returns memory of so many bytes, for one message; it is valid until the next call."""
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
