"""Plain MPI through mpi4py behind the communicator: needs no Horovod."""

from __future__ import annotations

import atexit
import ctypes
import math
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvdlocal.communicator.base import Communicator
from hvdlocal.communicator.groups import Groups
from hvdlocal.exit_codes import ExitCode
from hvdlocal.terminal import Guarded

DEPARTURE_GRACE_SECONDS = 3.0


class _PeerLeftError(RuntimeError):
    """Another rank has left the job."""


class _Departures:
    """The messages by which ranks that leave the job announce it, over a communicator of their own.

    Attributes:
        announced: whether this rank has left.
    """

    def __init__(self, ranks: Any) -> None:
        self.announced = False
        self._ranks = ranks
        self._first_seen = math.inf

    def announce(self) -> None:
        """Sends this rank's departure to all others, and does not wait for them."""
        self.announced = True
        others = [peer for peer in range(self._ranks.size) if peer != self._ranks.rank]
        self._notices = [self._ranks.Isend(b"", dest=peer) for peer in others]

    def first_of(self, ranks: Sequence[int]) -> int | None:
        """The first of `ranks` that has left."""
        if not self._ranks.Iprobe():
            return None
        left = next((rank for rank in ranks if self._ranks.Iprobe(source=rank)), None)
        if left is not None:
            self._first_seen = min(self._first_seen, time.monotonic())
        return left

    @property
    def seconds(self) -> float:
        """How long ago the first departure was seen; negative without one."""
        return time.monotonic() - self._first_seen


class Mpi4pyCommunicator(Communicator):
    """All ranks of `MPI.COMM_WORLD`. See `Communicator`.

    One thread of its own makes the (blocking) MPI calls in the order in which they were asked for: the fastest allreduce
    of an MPI is its blocking one, and the main thread stays able to see signals and deadlines. CUDA tensors are staged
    through host memory, since not every MPI can read a GPU's.

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
        node = self._ranks.Split_type(MPI.COMM_TYPE_SHARED)
        super().__init__(self._ranks.rank, self._ranks.size, node.rank, node.size, timeout_seconds)
        node.Free()
        self._departures = _Departures(MPI.COMM_WORLD.Dup())
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="hvdlocal-mpi", daemon=True)
        self._thread.start()
        if self.size > 1:
            # Without this, a rank that dies of an exception waits in MPI_Finalize for peers that wait for it.
            sys.excepthook = self._abort_on_exception
            # And one that ends otherwise (sys.exit) tells its peers, so that they do not wait for it either.
            atexit.register(self._leave)

    def shutdown(self) -> None:
        if self.is_open:
            self._departures.announce()
            self._calls.put(None)

    @property
    def is_open(self) -> bool:
        """See `Communicator`."""
        return not self._departures.announced

    def _leave(self) -> None:
        """Leaves the job at the end of the process, before MPI_Finalize, which crashes or hangs beside a collective under way."""
        self.shutdown()
        self._thread.join(DEPARTURE_GRACE_SECONDS)
        if self._thread.is_alive():
            print(
                f"{self.describe()}: the program ends while a collective is under way that the other ranks have not come to; "
                "ending the job\n",
                end="",
                file=sys.__stderr__,
            )
            self.abort(ExitCode.PEER_FAILED)

    def _check_peers(self) -> None:
        # A peer may leave for good reasons while the last collective still completes here: hence the seconds of grace.
        if self._mpi.Query_thread() < self._mpi.THREAD_MULTIPLE:
            return
        left = self._departures.first_of(self.job_ranks)
        if left is not None and self._departures.seconds > DEPARTURE_GRACE_SECONDS:
            raise _PeerLeftError(f"rank {left} has left")

    def _says_that_a_peer_left(self, error: RuntimeError) -> bool:
        return isinstance(error, _PeerLeftError)

    def abort(self, exit_code: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            Guarded(stream).flush()
        self._mpi.COMM_WORLD.Abort(exit_code)

    def _join_group(self, groups: Groups, name: str) -> None:
        def work() -> Any:
            self._agree_on(f"split ({name})")
            return self._ranks.Split(color=groups.index(self.job_ranks), key=self.rank)

        self._ranks = self._wait(self._submit(work), name)

    def _start_sum(self, flat: torch.Tensor, name: str) -> _Call:
        what = f"sum of {flat.numel()} {flat.dtype} ({name})"
        return self._in_host_memory(
            flat, what, lambda host: self._ranks.Allreduce(self._mpi.IN_PLACE, host, op=self._mpi.SUM)
        )

    def _start_broadcast(self, flat: torch.Tensor, name: str, root: int) -> _Call:
        what = f"broadcast of {flat.numel()} {flat.dtype} from rank {root} ({name})"
        return self._in_host_memory(flat, what, lambda host: self._ranks.Bcast(host, root=root))

    def _gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        def work() -> list[bytes]:
            self._agree_on(f"gather ({name})")
            return self._ranks.allgather(data)

        return self._wait(self._submit(work), name)

    def _agree_on(self, what: str) -> None:
        """Refuses ranks that ask for different collectives: MPI would give some of them garbage, or let them wait.

        One allreduce of two numbers, the latency of which a collective pays once more.
        """
        mine = zlib.crc32(what.encode())
        extremes = np.array([mine, -mine], dtype=np.int64)
        self._ranks.Allreduce(self._mpi.IN_PLACE, extremes, op=self._mpi.MAX)
        if extremes[0] != -extremes[1]:
            everyone = self._ranks.allgather(what)
            told = [f"rank {rank}: {one}" for rank, one in list(zip(self.job_ranks, everyone, strict=True))[:8]]
            raise RuntimeError(f"the ranks ask for different collectives at the same time, {'; '.join(told)}")

    def _in_host_memory(self, flat: torch.Tensor, what: str, collective: Callable[[Any], None]) -> _Call:
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()  # the copy below is made on another thread's stream

        def work() -> None:
            self._agree_on(what)
            host = flat.cpu()  # the tensor itself when it is on the CPU already
            collective(_memory(host))
            if host is not flat:
                flat.copy_(host)

        return self._submit(work)

    def _submit(self, work: Callable[[], Any]) -> _Call:
        call = _Call(work)
        self._calls.put(call)
        return call

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call.run()

    def _abort_on_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # To the process's own stderr: torch.distributed calls hooks with a buffer in its place, which would end with the process.
        traceback.print_exception(kind, error, trace, file=sys.__stderr__)
        print(f"{self.describe()}: uncaught {kind.__name__}; ending the job\n", end="", file=sys.__stderr__)
        self.abort(ExitCode.FAILED)


def _memory(tensor: torch.Tensor) -> NDArray[Any]:
    """The memory of a contiguous tensor on the CPU. After `Tensor.numpy()` torch would never resize it again, which layers for
    quantisation do to their buffers.
    """
    dtype = torch.empty(0, dtype=tensor.dtype, device="cpu").numpy().dtype
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return np.ndarray((tensor.numel(),), dtype, memoryview(memory))


class _Call:
    """One MPI call, made by the communicator's thread."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._future: Future[Any] = Future()

    def run(self) -> None:
        try:
            self._future.set_result(self._work())
        except BaseException as error:
            self._future.set_exception(error)

    def done(self) -> bool:
        return self._future.done()

    def finish(self) -> Any:
        return self._future.result()
