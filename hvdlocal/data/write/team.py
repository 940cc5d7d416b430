"""The processes that prepare a data set together: the ranks of a communicator, or this one alone."""

from collections.abc import Callable
from typing import Any, TypeVar

from hvdlocal.communicator import Communicator, require_agreement, succeed_together

T = TypeVar("T")


class Team:
    """Ranks that share out shards among themselves.

    Args:
        communicator: the ranks; None for a process by itself, which then needs no MPI.
    """

    def __init__(self, communicator: Communicator | None = None) -> None:
        self._communicator = communicator
        self.rank = communicator.rank if communicator else 0
        self.size = communicator.size if communicator else 1
        self.local_size = communicator.local_size if communicator else 1

    def gather(self, value: T, name: str) -> list[T]:
        """The value of every rank, in the order of the ranks, on every rank."""
        return self._communicator.gather(value, name) if self._communicator else [value]

    def together(self, work: Callable[[], T], name: str) -> T:
        """Do ``work`` on every rank. What fails on one (ValueError, OSError, ImportError) fails on all, with one message."""
        return succeed_together(self._communicator, work, name) if self._communicator else work()

    def first(self, work: Callable[[], T], name: str) -> T:
        """Do ``work`` on rank 0 alone; its result, or its failure, on every rank."""
        result: Any = self.together(lambda: work() if self.rank == 0 else None, name)
        return self.gather(result, name)[0]

    def agree(self, facts: dict[str, Any], name: str) -> None:
        """Raise ValueError on every rank unless all hold the same facts."""
        if self._communicator:
            require_agreement(self._communicator, facts, name)
