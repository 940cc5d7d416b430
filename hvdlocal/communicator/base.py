"""What hvdlocal asks of a message-passing library: three collectives, and a wait that ends.

Everything above this package talks to a `Communicator`; only the engines beside this file import Horovod, MPI or
torch.distributed.
"""

from __future__ import annotations

import copy
import os
import pickle
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hvdlocal.communicator.errors import CollectiveTimeoutError, CommunicationError
from hvdlocal.communicator.groups import Groups, check_groups
from hvdlocal.communicator.losses import Loss, MissingRanksError
from hvdlocal.terminal import Guarded

MAX_ELEMENTS = 2**31 - 1
"""The most elements of one collective: MPI counts in C int. Longer tensors travel in pieces."""


class Pending(Protocol):
    """A collective under way."""

    def done(self) -> bool:
        """Whether `finish` would return at once."""

    def finish(self) -> Any:
        """The result; raises what the backend raises when the collective failed."""


@dataclass(frozen=True)
class StartedSum:
    """A sum that was begun; a call of it waits until the sum is there.

    Attributes:
        wait: waits, and raises what has made the collective fail.
        done: returns whether the collective has ended.
    """

    wait: Callable[[], None]
    done: Callable[[], bool]

    def __call__(self) -> None:
        """Waits until the sum is there."""
        self.wait()


@dataclass
class Traffic:
    """What this rank has handed to the collectives of a communicator since the start; that of a group is counted apart."""

    collectives: int = 0
    bytes: int = 0

    def count(self, sent: int) -> None:
        """Adds one collective of so many bytes."""
        self.collectives += 1
        self.bytes += sent


class Communicator(ABC):
    """The ranks of one job, or of a group of them (`split`), and the collectives between them.

    Every collective carries a constant name, must be called by all ranks in the same order, and ends: with a result, or
    with an error that names the collective and the rank when `timeout_seconds` have passed.

    Attributes:
        backend: "horovod", "mpi4py", "torch", or "single" (`SingleProcess`).
        rank, size: this process among the processes of this communicator.
        job_ranks: the ranks of this communicator as they are numbered in the job; in messages ranks have these numbers.
        local_rank, local_size: this process among those on its node.
        timeout_seconds: how long one collective may take, the wait for the slowest rank included.
        traffic: collectives and bytes of this communicator so far.
        island: the ranks of this rank's island; None without islands (`hvdlocal.init(island=…)`).
        peers: the ranks that have this rank's place in their islands, this one included; None without islands.
        islands: the ranks of every island; empty without islands.
        survives: whether the job goes on without ranks that die. Then `rank`, `size`, `job_ranks`, `local_rank` and `local_size`
            become those of the survivors, at the same collective on every survivor, when it is waited for.
        losses: the ranks that died so far, in the order in which the others noticed it; empty unless the job survives.
    """

    backend: str
    survives = False

    def __init__(self, rank: int, size: int, local_rank: int, local_size: int, timeout_seconds: float) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.local_size = local_size
        self.job_ranks = tuple(range(size))
        self.timeout_seconds = timeout_seconds
        self.traffic = Traffic()
        self.island: Communicator | None = None
        self.peers: Communicator | None = None
        self.islands: Sequence[Sequence[int]] = ()
        self.job_size = size
        self.losses: list[Loss] = []
        self._unbroken = False

    @property
    def island_size(self) -> int:
        """The number of ranks of an island; 1 without islands."""
        return self.island.size if self.island else 1

    @property
    def num_islands(self) -> int:
        """The number of islands; the number of ranks without islands."""
        return self.size // self.island_size

    def sum_(self, tensor: torch.Tensor, name: str) -> None:
        """Replaces `tensor` on every rank by its sum over the ranks, in place and without a copy.

        Args:
            tensor: contiguous; float32, float64, int32 or int64; the same shape and dtype on every rank.
            name: what it is, the same on every rank and at every call ("hvdlocal.average").
        """
        self.start_sum_(tensor, name)()

    def start_sum_(self, tensor: torch.Tensor, name: str) -> StartedSum:
        """Begins a `sum_` and does not wait for the other ranks.

        Returns:
            A function that waits for the sum. Until it has returned, the tensor belongs to the communicator.
        """
        if not tensor.is_contiguous():
            raise ValueError(f"collective {name!r}: the tensor must be contiguous to be summed in place")
        self._count(tensor)
        if self.size == 1:
            return StartedSum(lambda: None, lambda: True)
        pieces = self._pieces(tensor.detach().view(-1), name)
        with self._explained(name):
            pending = [(self._start_sum(piece, piece_name), piece_name) for piece, piece_name in pieces]

        def finish() -> None:
            with self._explained(name):
                for one, piece_name in pending:
                    self._wait(one, piece_name)

        return StartedSum(finish, lambda: all(one.done() for one, _ in pending))

    def broadcast_(self, tensor: torch.Tensor, name: str, root: int = 0) -> None:
        """Replaces `tensor`, of any shape, layout and dtype, on every rank by that of rank `root`, in place."""
        self._count(tensor)
        if self.size == 1:
            return
        flat = tensor.detach().contiguous().view(-1)
        with self._explained(name):
            for piece, piece_name in self._pieces(
                flat.view(torch.uint8), name
            ):  # only bits are moved, so any dtype will do
                self._wait(self._start_broadcast(piece, piece_name, root), piece_name)
        if not tensor.is_contiguous():
            tensor.detach().copy_(flat.view(tensor.shape))

    def share_slices_(self, tensor: torch.Tensor, name: str) -> None:
        """Replaces each of `size` equal slices of a tensor by that of the rank of the same number (an allgather in place).

        Args:
            tensor: contiguous; its elements are a multiple of `size`; the same shape and dtype on every rank.
            name: as for `sum_`.
        """
        self._count(tensor)
        if self.size == 1 or tensor.numel() == 0:
            return
        with self._explained(name):
            for one, piece_name in self._start_sharing(tensor.detach().view(-1), name):
                self._wait(one, piece_name)

    def gather(self, value: Any, name: str) -> list[Any]:
        """The picklable `value` of every rank, in the order of the ranks, on every rank."""
        if self.size == 1:
            return [value]
        with self._explained(name):
            parts = self._gather_bytes(pickle.dumps(value), name)
        self.traffic.count(len(parts[self.rank]))
        return [pickle.loads(part) for part in parts]  # our own ranks wrote it

    def barrier(self, name: str) -> None:
        """Returns when every rank has called it."""
        self.sum_(torch.zeros(1, dtype=torch.float32, device="cpu"), name)

    def split(self, groups: Sequence[Sequence[int]], name: str) -> Communicator:
        """Divides the ranks of the job into groups; a collective of all of them.

        The collectives of a group need no rank outside it, and its traffic is counted apart. The deadline is the job's, and
        `shutdown` leaves the job.

        Args:
            groups: ranks in ascending order; every rank of the job is in exactly one group. The same on every rank.
            name: the collective's name.

        Returns:
            The communicator of the group of this rank.

        Raises:
            ValueError: the ranks are not divided into groups, the ranks gave different groups, or this is a group itself.
        """
        if self.size != self.job_size:
            raise ValueError(
                f"split ({name!r}): a group cannot be divided again; split the communicator of the whole job"
            )
        divided = [tuple(group) for group in groups]
        check_groups(self.gather(divided, name), f"split ({name!r})")
        mine = next(group for group in divided if self.rank in group)
        part = copy.copy(self)  # what belongs to the job is shared: connection, thread, deadline
        part.rank, part.size, part.job_ranks = mine.index(self.rank), len(mine), mine
        part.traffic = Traffic()
        part.island = part.peers = None
        with self._explained(name):
            part._join_group(divided, name)
        return part

    def split_into_islands(self, islands: Sequence[Sequence[int]]) -> tuple[Communicator, Communicator]:
        """Returns the communicators of this rank's island and of the ranks at its place in all islands; a collective.

        Args:
            islands: the ranks of each, of one size; as `groups` of `split`.
        """
        peers = [sorted(group) for group in zip(*islands, strict=True)]
        return self.split(islands, "hvdlocal.islands"), self.split(peers, "hvdlocal.peers")

    def describe(self) -> str:
        """This process, for the beginning of a message: 'rank 3 of 8 on node17'."""
        return f"rank {self.job_ranks[self.rank]} of {self.job_size} on {socket.gethostname()}"

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """Within, the job does not go on without a rank: for what would be half done, such as the set-up of a run.

        Raises:
            MissingRanksError: on all other ranks, at the same collective: a rank is lost, also when that was before.
        """
        self._unbroken = True
        try:
            yield
        finally:
            self._unbroken = False

    @property
    def is_open(self) -> bool:
        """Whether collectives can be called: neither this object nor the library below it was shut down."""
        return True

    @property
    def can_be_replaced(self) -> bool:
        """Whether, after `shutdown`, this process can join its job again."""
        return True

    @abstractmethod
    def shutdown(self) -> None:
        """Leaves the job. The communicator cannot be used afterwards."""

    def abort(self, exit_code: int) -> None:
        """Ends this process at once; the launcher then ends the others. For when no collective can succeed any more."""
        Guarded(sys.stdout).flush()
        os._exit(exit_code)

    @abstractmethod
    def _join_group(self, groups: Groups, name: str) -> None:
        """Makes this copy of the job's communicator the one of the group `job_ranks`; a collective of all ranks of the job."""

    @abstractmethod
    def _start_sum(self, flat: torch.Tensor, name: str) -> Pending: ...

    @abstractmethod
    def _start_broadcast(self, flat: torch.Tensor, name: str, root: int) -> Pending: ...  # flat is uint8

    def _start_sharing(self, flat: torch.Tensor, name: str) -> list[tuple[Pending, str]]:
        """Begins `share_slices_`, as broadcasts at the same time; an engine with an allgather in place has a faster way."""
        slices = flat.split(flat.numel() // self.size)
        return [
            (self._start_broadcast(piece, piece_name, root), piece_name)
            for root, one in enumerate(slices)
            for piece, piece_name in self._pieces(one.view(torch.uint8), f"{name}.{root}")
        ]

    @abstractmethod
    def _gather_bytes(self, data: bytes, name: str) -> list[bytes]: ...

    def _pieces(self, flat: torch.Tensor, name: str) -> list[tuple[torch.Tensor, str]]:
        """A vector in pieces that one collective can carry, each with its name."""
        if flat.numel() <= MAX_ELEMENTS:
            return [(flat, name)]
        return [(piece, f"{name}.{i}") for i, piece in enumerate(flat.split(MAX_ELEMENTS))]

    def _count(self, tensor: torch.Tensor) -> None:
        if self.size > 1:
            self.traffic.count(tensor.numel() * tensor.element_size())

    def _wait(self, pending: Pending, name: str) -> Any:
        """Polls and sleeps rather than blocks, so that signal handlers run, the core is free and the deadline holds."""
        start = time.monotonic()
        limit = self.timeout_seconds
        while not pending.done():
            waited = time.monotonic() - start
            if waited > limit:
                limit = self._pass_deadline(pending, waited, name)
            if waited > 1:
                self._check_peers()
            time.sleep(min(1e-3, max(5e-5, waited / 50)))
        return pending.finish()

    def _pass_deadline(self, pending: Pending, waited: float, name: str) -> float:
        """Raises that a wait of `waited` seconds has passed its deadline; an engine may return a later one instead."""
        raise CollectiveTimeoutError(
            f"{self.describe()} waited {waited:.0f} s in the collective {name!r}: at least one other rank has not come to it. "
            f"Look for a rank that died, hangs or took another branch; a longer limit is set with HVDLOCAL_TIMEOUT_SECONDS (now "
            f"{self.timeout_seconds:g})."
        )

    def _check_peers(self) -> None:  # noqa: B027  (nothing to check is a valid answer)
        """Raises RuntimeError when the collective that has been waited for cannot complete any more."""

    def _says_that_a_peer_left(self, error: RuntimeError) -> bool:
        """Whether the backend's error means that another rank has left the job."""
        return False

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        if not self.is_open:
            raise CommunicationError(
                f"{self.describe()}: the collective {name!r} was called after shutdown(): call shutdown() at the end of the "
                "program, when nothing uses the communicator any more"
            )
        try:
            yield
            if self._unbroken and self.losses:
                raise MissingRanksError("; ".join(map(str, self.losses)))
        except CommunicationError:
            raise
        except RuntimeError as error:
            if self._says_that_a_peer_left(error):
                why = (
                    "cannot complete, because another rank has left the job. If that rank failed, it has said why (look for "
                    "the first message of the job); if it has merely finished, it had fewer steps to do than this one"
                )
            else:
                why = "failed, most often because the ranks did not ask for the same thing or a rank failed"
            raise CommunicationError(f"{self.describe()}: the collective {name!r} {why} ({error})") from error
