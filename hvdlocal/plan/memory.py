"""The memory of averaging on one rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AveragingMemory:
    """Bytes that a rank holds for averaging; its gradient and the moments that are not averaged come on top.

    Attributes:
        parameters: one copy of the parameters.
        buffer: the flat buffer of all that is averaged; the parameters themselves lie there.
        overlap: what is sent while steps go on, and what was sent: two flat buffers; 0 without overlap.
        outer: φ and the outer optimizer's momentum, of which each rank of an island has a slice; 0 for plain averaging.
    """

    parameters: int
    buffer: int
    overlap: int
    outer: int

    @property
    def copies(self) -> float:
        """All of it in copies of the parameters."""
        return (self.buffer + self.overlap + self.outer) / self.parameters
