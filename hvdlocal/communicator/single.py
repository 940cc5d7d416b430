"""A job of one process, which needs no launcher and no message-passing library."""

from __future__ import annotations

import math

import torch

from hvdlocal.communicator.base import Communicator
from hvdlocal.communicator.groups import Groups


class SingleProcess(Communicator):
    """This process alone. See `Communicator`.

    Args:
        size: number of ranks to stand for. More than one makes a dry run of a larger job, in which all other ranks hold
            what this one holds: a sum multiplies by `size`, and `gather` repeats the value.
    """

    backend = "single"

    def __init__(self, size: int = 1) -> None:
        super().__init__(0, size, 0, size, timeout_seconds=math.inf)

    def shutdown(self) -> None:
        """See `Communicator`. There is nothing to leave."""

    def _join_group(self, groups: Groups, name: str) -> None:
        pass

    def _start_sum(self, flat: torch.Tensor, name: str) -> _Done:
        flat.mul_(self.size)
        return _Done()

    def _start_broadcast(self, flat: torch.Tensor, name: str, root: int) -> _Done:
        return _Done()

    def _gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        return [data] * self.size


class _Done:
    """A collective that has completed."""

    def done(self) -> bool:
        return True

    def finish(self) -> None:
        pass
