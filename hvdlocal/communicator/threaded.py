"""What engines with blocking collectives share: a thread makes their calls, in the order in which they are asked for."""

from __future__ import annotations

import atexit
import sys
import threading
import traceback
import zlib
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hvdlocal.communicator.base import Communicator
from hvdlocal.communicator.groups import Groups
from hvdlocal.exit_codes import ExitCode

DEPARTURE_GRACE_SECONDS = 3.0

C = TypeVar("C", bound="Call")


class DifferentCollectivesError(RuntimeError):
    """The ranks ask for different collectives at the same time; raised on all of them."""


class ThreadedCommunicator(Communicator):
    """Ranks whose collectives are blocking calls of a thread, so that the main thread sees signals and deadlines.

    A group of `split` has a thread of its own if the library allows calls of several at once, so that an average between islands
    which takes long does not hold up the sums inside of them; else it shares the one of the job.
    """

    _allows_several_threads = True
    _consequence = "ending the job"
    """What an uncaught exception leads to."""

    def __init__(self, rank: int, size: int, local_rank: int, local_size: int, timeout_seconds: float) -> None:
        super().__init__(rank, size, local_rank, local_size, timeout_seconds)
        self._threads: dict[tuple[int, ...], _CallThread] = {}  # by the ranks whose calls they make
        self._calls = self._thread()
        if size > 1:
            # Without this, a rank that dies of an exception waits at its end for peers that wait for it.
            sys.excepthook = self._abort_on_exception
            # And one that ends otherwise (sys.exit) tells its peers, so that they do not wait for it either.
            atexit.register(self._leave)

    def shutdown(self) -> None:
        """See `Communicator`."""
        if self.is_open:
            self._announce_departure()
            for thread in self._threads.values():
                thread.close()

    @property
    def is_open(self) -> bool:
        """See `Communicator`."""
        return not self._calls.closed

    @property
    def _taking_part(self) -> tuple[int, ...]:
        """The ranks that the thread's collectives connect, as they are numbered in the job."""
        return self.job_ranks

    def _thread(self) -> _CallThread:
        """The thread of the ranks of this communicator."""
        if self.job_ranks not in self._threads:
            self._threads[self.job_ranks] = _CallThread(f"hvdlocal-{self.backend}-{len(self._threads)}")
        return self._threads[self.job_ranks]

    def _join_group(self, groups: Groups, name: str) -> None:
        """See `Communicator`."""
        self._connect_group(groups, name)
        if self._allows_several_threads:
            self._calls = self._thread()

    @abstractmethod
    def _connect_group(self, groups: Groups, name: str) -> None:
        """Connects the ranks of this group, by a call of the job's thread."""

    @abstractmethod
    def _announce_departure(self) -> None:
        """Lets the other ranks see that this one has left, without waiting for them."""

    @abstractmethod
    def _maximum_(self, numbers: NDArray[np.int64]) -> None:
        """Replaces numbers by their maxima over the ranks; blocks."""

    @abstractmethod
    def _exchange(self, data: bytes) -> list[bytes]:
        """The data of every rank; blocks."""

    def _gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        def work() -> list[bytes]:
            self._agree_on(f"gather ({name})")
            return self._exchange(data)

        return self._wait(self._submit(work), name)

    def _agree_on(self, what: str) -> None:
        """Refuses ranks that ask for different collectives: they would get garbage, or wait for each other.

        One allreduce of two numbers, the latency of which a collective pays once more.
        """
        mine = zlib.crc32(what.encode())
        extremes = np.array([mine, -mine], dtype=np.int64)
        self._maximum_(extremes)
        if extremes[0] != -extremes[1]:
            everyone = [one.decode() for one in self._exchange(what.encode())]
            told = [f"rank {rank}: {one}" for rank, one in list(zip(self._taking_part, everyone, strict=True))[:8]]
            raise DifferentCollectivesError(
                f"the ranks ask for different collectives at the same time, {'; '.join(told)}"
            )

    def _in_host_memory(self, flat: torch.Tensor, what: str, collective: Callable[[torch.Tensor], None]) -> Call:
        """Submits a collective that needs its tensor on the CPU; a CUDA tensor is copied there and back."""
        # The thread's own stream does not wait for the kernels that compute the tensor; this thread goes on to the next ones.
        computed = torch.cuda.current_stream(flat.device).record_event() if flat.is_cuda else None

        def work() -> None:
            self._agree_on(what)
            if computed is not None:
                computed.synchronize()
            through_host_memory(flat, collective)

        return self._submit(work)

    def _submit(self, work: Callable[[], Any]) -> Call:
        return self._calls.submit(Call(work))

    def _leave(self) -> None:
        """Leaves the job at the end of the process, before its libraries do; beside a collective under way they crash or hang."""
        self.shutdown()
        if not all(thread.ended_within(DEPARTURE_GRACE_SECONDS) for thread in self._threads.values()):
            print(
                f"{self.describe()}: the program ends while a collective is under way that the other ranks have not come to; "
                "ending the job\n",
                end="",
                file=sys.__stderr__,
            )
            self.abort(ExitCode.PEER_FAILED)

    def _abort_on_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # To the process's own stderr: torch.distributed calls hooks with a buffer in its place, which would end with the process.
        traceback.print_exception(kind, error, trace, file=sys.__stderr__)
        print(f"{self.describe()}: uncaught {kind.__name__}; {self._consequence}\n", end="", file=sys.__stderr__)
        self.abort(ExitCode.FAILED)


def through_host_memory(flat: torch.Tensor, collective: Callable[[torch.Tensor], None]) -> None:
    """Applies an in-place collective to a tensor, or to its copy on the CPU if it lies elsewhere."""
    host = flat.cpu()  # the tensor itself when it is on the CPU already
    collective(host)
    if host is not flat:
        flat.copy_(host)


class _CallThread:
    """A thread that makes calls one after another.

    Attributes:
        closed: whether it takes no more calls.
    """

    def __init__(self, name: str) -> None:
        self.closed = False
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: C) -> C:
        self._calls.put(call)
        return call

    def close(self) -> None:
        """Ends the thread after the calls that it has been given."""
        self.closed = True
        self._calls.put(None)

    def ended_within(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call.run()


class Call:
    """A call, made by the thread."""

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
