"""MPI ranks that go on without those that die."""

from __future__ import annotations

import atexit
import copy
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hvdlocal.communicator.base import MAX_ELEMENTS, Communicator, Pending, Traffic
from hvdlocal.communicator.errors import CommunicationError
from hvdlocal.communicator.hung_ranks import open_board
from hvdlocal.communicator.losses import Loss, MissingRanksError, TooFewRanksError
from hvdlocal.communicator.mpi4py_backend import PIECE_BYTES, Mpi4pyCommunicator, memory_of
from hvdlocal.communicator.survivors import Island, Peers, Survivors
from hvdlocal.communicator.threaded import DEPARTURE_GRACE_SECONDS, Call
from hvdlocal.communicator.ulfm import end_without_mpi, ended_after, remove_shared_memory, start_mpi
from hvdlocal.exit_codes import ExitCode
from hvdlocal.terminal import Guarded, complain

T = TypeVar("T")

END = "hvdlocal.end_of_program"


class SurvivingCommunicator(Mpi4pyCommunicator):
    """All ranks of `MPI.COMM_WORLD`, and after a loss those that are left. See `Communicator`.

    A rank has died when its process has ended: killed, out of memory, with its node, or by an uncaught exception. A rank that
    does not come to a collective within `timeout_seconds`, or does not run at all then, is killed by the other ranks of its
    node. The others repeat the collective among themselves: a sum is that of the survivors, `gather` returns their values, and a
    broadcast comes from the first survivor if its root has died. `share_slices_` leaves the slice of a rank that has died as the
    first survivor has it. An island of which a rank has died leaves as a whole.

    Raises:
        ImportError: mpi4py is not installed.
        LaunchError: the ranks were not started such that they can survive.
        MissingRanksError: one of them died before the others could go on without it.
    """

    survives = True
    _consequence = "the other ranks go on without this one"

    def __init__(self, timeout_seconds: float) -> None:
        with ended_after(timeout_seconds):
            mpi = start_mpi()
            try:
                super().__init__(timeout_seconds)
                node = self._ranks.Split_type(mpi.COMM_TYPE_SHARED)
                self._board = open_board(node, timeout_seconds / 2)
                # Of every rank of the job: its host, and the first rank of its node.
                everyone = self._ranks.allgather((socket.gethostname(), node.bcast(self.rank)))
            except mpi.Exception as error:
                self._gave_up = True
                atexit.unregister(self._leave)  # which would agree on the end with the others
                raise MissingRanksError(
                    f"a rank died while the ranks of this job were joined ({error}): start it again"
                ) from error
        self._nodes = [first for _, first in everyone]
        hosts = [host for host, _ in everyone]
        self._survivors: Survivors | Peers | Island = Survivors(mpi, self._ranks, hosts, self._leave_with_island)
        self._job = self
        self._gave_up = False

    @property
    def can_be_replaced(self) -> bool:
        """See `Communicator`. After a loss, MPI cannot connect the ranks of the job again."""
        return not self._survivors.losses

    def split(self, groups: Sequence[Sequence[int]], name: str) -> Communicator:
        """Refuses groups: a rank that dies would be missed in its group alone.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"split ({name!r}): with survive, the ranks cannot be divided into groups other than islands")

    def split_into_islands(self, islands: Sequence[Sequence[int]]) -> tuple[Communicator, Communicator]:
        """See `Communicator`."""
        survivors = self._survivors
        assert isinstance(survivors, Survivors)

        def connect() -> tuple[Communicator, Communicator]:
            survivors.islands = islands
            self._agree_on(f"split into {islands}")
            return self._part(survivors.divide()), self._part(Peers(survivors))

        # One thread makes the collectives of all three. With two of them, one in fifteen jobs hung or failed (Open MPI 5.0.11).
        with self._explained("hvdlocal.islands"):
            return self._wait(self._submit_collective("hvdlocal.islands", connect), "hvdlocal.islands")

    def _part(self, members: Peers | Island) -> SurvivingCommunicator:
        """A communicator of some of the ranks; what belongs to the job is shared."""
        part = copy.copy(self)
        part._survivors = members
        part.job_ranks = members.members
        part.rank, part.size = part.job_ranks.index(self.job_ranks[self.rank]), len(part.job_ranks)
        node = members.ranks.Split_type(self._mpi.COMM_TYPE_SHARED)
        part._in_shared_memory = node.size == part.size
        node.Free()
        part.traffic = Traffic()
        part._unbroken = False  # its own; the islands are formed in such a context
        return part

    def shutdown(self) -> None:
        """See `Communicator`. A collective: it returns when all ranks that are left have called it."""
        if not self.is_open:
            return
        try:
            if self.size > 1:
                with self._explained(END):
                    self._wait(self._submit_collective(END, lambda: self._agree_on("the end of the program")), END)
        finally:
            super().shutdown()
            self._board.close()

    def abort(self, exit_code: int) -> None:
        """Ends this process. The other ranks go on without it, unless all of them end so: then the job has this exit code.

        The process is killed: of one that ends with an exit code, Open MPI does not tell the others.
        """
        for stream in (sys.stdout, sys.stderr):
            Guarded(stream).flush()
        if not self._gave_up:
            self._departures.announce()
            own = self.job_ranks[self.rank]
            start = time.monotonic()  # others may have the same reason, and print it
            while not all(self._departures.left(rank) for rank in self._survivors.members if rank != own):
                if time.monotonic() - start > DEPARTURE_GRACE_SECONDS:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.05)
        # Not by MPI_Abort: after a loss, mpirun ends with 0 then. It ends the other ranks as well, with this code.
        remove_shared_memory()
        os._exit(exit_code)

    def _leave(self) -> None:
        if self._gave_up:
            self.abort(ExitCode.INTERRUPTED)
        try:
            self.shutdown()
        except CommunicationError as error:
            complain(str(error))
            self.abort(ExitCode.PEER_FAILED)
        end_without_mpi()

    def _leave_with_island(self, dead: Sequence[int], others: bool) -> NoReturn:
        """Ends this process, which the other islands then miss. No other thread of it may go on: it would write into files."""
        # Not every rank of it notices which one has died.
        lost = f"rank{'s' if len(dead) > 1 else ''} {', '.join(map(str, dead))}" if dead else "a rank"
        complain(f"{self.describe()} leaves the job, because its island has lost {lost}")
        for stream in (sys.stdout, sys.stderr):
            Guarded(stream).flush()
        if not others:
            remove_shared_memory()
            os._exit(ExitCode.INTERRUPTED)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("not reached")

    @property
    def _inside(self) -> bool:
        """Whether these are the ranks of an island."""
        return isinstance(self._survivors, Island)

    def _check_peers(self) -> None:
        """A peer that has left has died."""

    def _wait(self, pending: Pending, name: str) -> Any:
        with self._board.waiting():
            result, losses = super()._wait(pending, name)
        self._job._take_in(self._survivors.losses[len(self.losses) : losses])
        return result

    def _take_in(self, losses: Sequence[Loss]) -> None:
        """Shows the main thread what the thread of the collectives has gone on with for some time."""
        if not losses:
            return
        own, before = self.job_ranks[self.rank], self.job_ranks
        self.losses += losses
        lost = {rank for loss in losses for rank in loss.ranks}
        for part in filter(None, (self, self.peers)):
            part.job_ranks = tuple(rank for rank in part.job_ranks if rank not in lost)
            part.rank, part.size = part.job_ranks.index(own), len(part.job_ranks)
        islands = [[before[rank] for rank in island] for island in self.islands]
        self.islands = [list(map(self.job_ranks.index, island)) for island in islands if not lost.intersection(island)]
        neighbours = [rank for rank in self.job_ranks if self._nodes[rank] == self._nodes[own]]
        self.local_rank, self.local_size = neighbours.index(own), len(neighbours)

    def _pass_deadline(self, pending: Pending, waited: float, name: str) -> float:
        assert isinstance(pending, _Collective)
        if not pending.late:
            pending.late = True
            self._kill_hung(pending.number, waited, name)
            return waited + self.timeout_seconds
        self._job._gave_up = True
        raise TooFewRanksError(
            f"{self.describe()} waited {waited:.0f} s in the collective {name!r}: ranks do not answer, and none of them could be "
            "found dead, so the others cannot go on without them. Look for a node that hangs or a network that is interrupted; a "
            f"longer limit is set with HVDLOCAL_TIMEOUT_SECONDS (now {self.timeout_seconds:g})."
        )

    def _kill_hung(self, collective: int, waited: float, name: str) -> None:
        """Kills the ranks of this node that a collective waits for."""
        own = self.job_ranks[self.rank]
        node = [rank for rank, first in enumerate(self._nodes) if first == self._nodes[own]]
        places = [place for place, rank in enumerate(node) if rank != own and rank in self._survivors.members]
        for place in self._board.kill_hung(places, collective, self._inside):
            complain(
                f"{self.describe()} waited {waited:.0f} s in the collective {name!r} for rank {node[place]} and killed it"
            )

    def _start_sum(self, flat: torch.Tensor, name: str) -> Call:
        return self._out_of_place(flat, name, f"sum of {flat.numel()} {flat.dtype}", self._sum_piece)

    def _sum_piece(self, sent: NDArray[Any], received: NDArray[Any]) -> None:
        self._survivors.ranks.Allreduce(sent, received, op=self._mpi.SUM)

    def _start_broadcast(self, flat: torch.Tensor, name: str, root: int) -> Call:
        sender = self.job_ranks[root]

        def broadcast_piece(sent: NDArray[Any], received: NDArray[Any]) -> None:
            np.copyto(received, sent)
            self._survivors.ranks.Bcast(received, root=self._survivors.place_of(sender))

        what = f"broadcast of {flat.numel()} {flat.dtype} from rank {sender}"
        return self._out_of_place(flat, name, what, broadcast_piece)

    def _start_sharing(self, flat: torch.Tensor, name: str) -> list[tuple[Pending, str]]:
        return Communicator._start_sharing(self, flat, name)  # by broadcasts, which do without a rank

    def _gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        def attempt() -> list[bytes]:
            self._agree_on(f"gather ({name})")
            return self._exchange(data)

        return self._wait(self._submit_collective(name, attempt), name)

    def _out_of_place(
        self, flat: torch.Tensor, name: str, what: str, collective: Callable[[NDArray[Any], NDArray[Any]], None]
    ) -> Call:
        """Submits a collective of all pieces of a tensor, which are all from the same ranks in the end.

        The tensor is overwritten after all have agreed, with one copy that a collective in place would not need: MPI may write to
        the memory of a failed collective for some time, in which the model must not lie.

        Args:
            collective: of one piece; takes what is sent and where to receive.
        """
        computed = torch.cuda.current_stream(flat.device).record_event() if flat.is_cuda else None

        def work() -> tuple[None, int]:
            if computed is not None:
                computed.synchronize()
            host = flat.cpu()  # the tensor itself when it is on the CPU already
            memory = memory_of(host)

            def attempt() -> NDArray[Any]:
                self._agree_on(f"{what} ({name})")
                received = self._survivors.messages.take(memory.nbytes).view(memory.dtype)
                for pieces in zip(self._cut(memory), self._cut(received), strict=True):
                    collective(*pieces)
                return received

            received, losses = self._complete(name, attempt)
            np.copyto(memory, received)
            if host is not flat:
                flat.copy_(host)
            return None, losses

        return self._submit(work)

    def _cut(self, memory: NDArray[Any]) -> list[NDArray[Any]]:
        """Memory in the pieces of which each is one collective of MPI."""
        length = max(1, PIECE_BYTES // memory.itemsize) if self._in_shared_memory else MAX_ELEMENTS
        return [memory[start : start + length] for start in range(0, memory.size, length)]

    def _submit_collective(self, name: str, attempt: Callable[[], Any]) -> Call:
        return self._submit(lambda: self._complete(name, attempt))

    def _complete(self, name: str, attempt: Callable[[], T]) -> tuple[T, int]:
        """Makes a collective, in its thread; returns its result and the number of losses until then, which `_wait` takes in."""
        return self._survivors.complete(name, attempt), len(self._survivors.losses)

    def _submit(self, work: Callable[[], tuple[Any, int]]) -> Call:
        return self._calls.submit(_Collective(work, self._board.enter(self._inside)))

    def _pieces(self, flat: torch.Tensor, name: str) -> list[tuple[torch.Tensor, str]]:
        return [(flat, name)]  # a loss between two pieces would make them the sums of different ranks

    @property
    def _taking_part(self) -> tuple[int, ...]:
        return self._survivors.members

    def _maximum_(self, numbers: NDArray[np.int64]) -> None:
        message = self._survivors.messages.take(numbers.nbytes).view(numbers.dtype)
        np.copyto(message, numbers)
        self._survivors.ranks.Allreduce(self._mpi.IN_PLACE, message, op=self._mpi.MAX)
        np.copyto(numbers, message)

    def _exchange(self, data: bytes) -> list[bytes]:
        ranks, own = self._survivors.ranks, self._survivors.ranks.rank
        message = self._survivors.messages.take(8 * ranks.size).view(np.int64)
        message[own] = len(data)
        ranks.Allgather(self._mpi.IN_PLACE, message)
        ends = np.cumsum(message)
        starts = ends - message
        lengths = message.tolist()
        everything = self._survivors.messages.take(int(ends[-1]))
        everything[starts[own] : ends[own]] = np.frombuffer(data, np.uint8)
        ranks.Allgatherv(self._mpi.IN_PLACE, [everything, lengths, self._mpi.BYTE])
        return [everything[start:end].tobytes() for start, end in zip(starts, ends, strict=True)]


class _Collective(Call):
    """A collective under way.

    Attributes:
        number: which of this rank's collectives it is.
        late: whether a wait for it has passed its first deadline.
    """

    def __init__(self, work: Callable[[], tuple[Any, int]], number: int) -> None:
        super().__init__(work)
        self.number = number
        self.late = False
