"""Plain MPI through mpi4py behind the communicator: needs no Horovod."""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvdlocal.communicator.base import MAX_ELEMENTS, Pending
from hvdlocal.communicator.groups import Groups
from hvdlocal.communicator.threaded import DEPARTURE_GRACE_SECONDS, Call, ThreadedCommunicator
from hvdlocal.terminal import Guarded

PIECE_BYTES = 2**22
"""Of a sum in shared memory. For a longer one Open MPI's default algorithm allocates a buffer of its length each time, of which
the kernel must clear every page: two to three times the work of the sum itself."""


class _PeerLeftError(RuntimeError):
    """Another rank has left the job."""


class Mpi4pyCommunicator(ThreadedCommunicator):
    """All ranks of `MPI.COMM_WORLD`. See `Communicator`.

    The fastest allreduce of an MPI is its blocking one, which a thread makes. CUDA tensors are staged through host memory, since
    not every MPI can read a GPU's.

    Raises:
        ImportError: mpi4py is not installed.
        RuntimeError: MPI does not let a second thread make calls.
    """

    backend = "mpi4py"

    def __init__(self, timeout_seconds: float) -> None:
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise RuntimeError(
                f"MPI was started with thread level {MPI.Query_thread()}, but hvdlocal needs MPI_THREAD_SERIALIZED (2) or "
                "higher: do not lower mpi4py.rc.thread_level, and use an MPI built with thread support."
            )
        self._mpi = MPI
        self._ranks = MPI.COMM_WORLD.Dup()
        self._departures = _Departures(MPI.COMM_WORLD.Dup())
        self._allows_several_threads = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        node = self._ranks.Split_type(MPI.COMM_TYPE_SHARED)
        super().__init__(self._ranks.rank, self._ranks.size, node.rank, node.size, timeout_seconds)
        self._in_shared_memory = node.size == self.size
        node.Free()

    def abort(self, exit_code: int) -> None:
        """See `Communicator`."""
        for stream in (sys.stdout, sys.stderr):
            Guarded(stream).flush()
        self._mpi.COMM_WORLD.Abort(exit_code)

    def _announce_departure(self) -> None:
        self._departures.announce()

    def _check_peers(self) -> None:
        # A peer may leave for good reasons while the last collective still completes here: hence the seconds of grace.
        if self._mpi.Query_thread() < self._mpi.THREAD_MULTIPLE:
            return
        left = self._departures.first_of(self.job_ranks)
        if left is not None and self._departures.seconds > DEPARTURE_GRACE_SECONDS:
            raise _PeerLeftError(f"rank {left} has left")

    def _says_that_a_peer_left(self, error: RuntimeError) -> bool:
        return isinstance(error, _PeerLeftError)

    def _connect_group(self, groups: Groups, name: str) -> None:
        def work() -> tuple[Any, bool]:
            self._agree_on(f"split ({name})")
            ranks = self._ranks.Split(color=groups.index(self.job_ranks), key=self.rank)
            node = ranks.Split_type(self._mpi.COMM_TYPE_SHARED)
            in_shared_memory = node.size == ranks.size
            node.Free()
            return ranks, in_shared_memory

        self._ranks, self._in_shared_memory = self._wait(self._submit(work), name)

    def _start_sum(self, flat: torch.Tensor, name: str) -> Call:
        def collective(host: torch.Tensor) -> None:
            memory = memory_of(host)
            piece = max(1, PIECE_BYTES // memory.itemsize) if self._in_shared_memory else memory.size
            for start in range(0, memory.size, piece):
                self._ranks.Allreduce(self._mpi.IN_PLACE, memory[start : start + piece], op=self._mpi.SUM)

        return self._in_host_memory(flat, f"sum of {flat.numel()} {flat.dtype} ({name})", collective)

    def _start_broadcast(self, flat: torch.Tensor, name: str, root: int) -> Call:
        def collective(host: torch.Tensor) -> None:
            self._ranks.Bcast(memory_of(host), root=root)

        what = f"broadcast of {flat.numel()} {flat.dtype} from rank {self.job_ranks[root]} ({name})"
        return self._in_host_memory(flat, what, collective)

    def _start_sharing(self, flat: torch.Tensor, name: str) -> list[tuple[Pending, str]]:
        if flat.numel() > MAX_ELEMENTS:
            return super()._start_sharing(flat, name)

        def collective(host: torch.Tensor) -> None:
            self._ranks.Allgather(self._mpi.IN_PLACE, memory_of(host))

        return [(self._in_host_memory(flat, f"slices of {flat.numel()} {flat.dtype} ({name})", collective), name)]

    def _maximum_(self, numbers: NDArray[np.int64]) -> None:
        self._ranks.Allreduce(self._mpi.IN_PLACE, numbers, op=self._mpi.MAX)

    def _exchange(self, data: bytes) -> list[bytes]:
        return self._ranks.allgather(data)


class _Departures:
    """The messages by which ranks that leave the job announce it, over a communicator of their own."""

    def __init__(self, ranks: Any) -> None:
        self._ranks = ranks
        self._first_seen = math.inf
        self._notices: list[Any] = []

    def announce(self) -> None:
        """Sends this rank's departure to all others, and does not wait for them."""
        others = [peer for peer in range(self._ranks.size) if peer != self._ranks.rank]
        for peer in others:
            with suppress(RuntimeError):  # it has died
                self._notices.append(self._ranks.Isend(b"", dest=peer))

    def first_of(self, ranks: Sequence[int]) -> int | None:
        """The first of `ranks` that has left."""
        if not self._ranks.Iprobe():
            return None
        left = next((rank for rank in ranks if self._ranks.Iprobe(source=rank)), None)
        if left is not None:
            self._first_seen = min(self._first_seen, time.monotonic())
        return left

    def left(self, rank: int) -> bool:
        """Whether a rank has announced its departure, or has died."""
        try:
            return self._ranks.Iprobe(source=rank)
        except RuntimeError:
            return True

    @property
    def seconds(self) -> float:
        """How long ago the first departure was seen; negative without one."""
        return time.monotonic() - self._first_seen


def memory_of(tensor: torch.Tensor) -> NDArray[Any]:
    """The memory of a contiguous tensor on the CPU. After `Tensor.numpy()` torch would never resize it again, which layers for
    quantisation do to their buffers.
    """
    dtype = torch.empty(0, dtype=tensor.dtype, device="cpu").numpy().dtype
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return np.ndarray((tensor.numel(),), dtype, memoryview(memory))
