"""How the ranks that are left repeat a collective in which others have died.

A collective of MPI may succeed on some ranks and fail on others. So all agree on it afterwards; if it failed anywhere, the
survivors connect anew and repeat it. All survivors do so in the same collective, and thus have the same losses.

Source: Bland, Bouteiller, Herault, Bosilca and Dongarra, "Post-failure recovery of MPI communication capability: design and
rationale", IJHPCA 27 (2013); chapter "User-level failure mitigation" of its proposal for the MPI standard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

from hvdlocal.communicator.losses import Loss
from hvdlocal.communicator.message_memory import MessageMemory
from hvdlocal.communicator.threaded import DifferentCollectivesError

T = TypeVar("T")


class Leaver(Protocol):
    """Ends this process, because others of its island have died."""

    def __call__(self, dead: Sequence[int], others: bool) -> NoReturn:
        """Ends it.

        Args:
            dead: ranks of the job that have died.
            others: whether other islands go on.
        """


class Survivors:
    """The ranks of a job that are left. All but reading its attributes is for the thread that makes the collectives.

    With islands, those that have lost a rank leave as a whole: what the ranks of an island hold in slices is complete then in
    each of the others.

    Args:
        mpi: the module `mpi4py.MPI`.
        ranks: MPI's communicator of all ranks of the job.
        hosts: that of every rank.
        leave: ends this process.

    Attributes:
        ranks: MPI's communicator of them.
        members: their numbers in the job, ascending.
        losses: the ranks that died so far, or have left with their island.
        peers: with islands, MPI's communicator of those that have this rank's place in their islands.
        messages: the memory to which MPI writes.
        islands: the ranks of each; to be set before any rank can find in `divide` that another one has died.
    """

    def __init__(self, mpi: Any, ranks: Any, hosts: Sequence[str], leave: Leaver) -> None:
        self._mpi = mpi
        self._own = ranks.rank
        self._job = ranks.Get_group()
        self._hosts = hosts
        self._leave = leave
        self.ranks = ranks
        self.members = tuple(range(ranks.size))
        self.losses: list[Loss] = []
        self.peers: Any = None
        self.messages = MessageMemory()
        self.islands: Sequence[Sequence[int]] = ()

    def divide(self) -> Island:
        """Connects the ranks of each of the `islands`, and the peers; a collective."""
        mine = self._island_of(self._own)
        inside = self.ranks.Split(self.islands.index(mine))
        self.peers = self.ranks.Split(mine.index(self._own))
        return Island(self._mpi, inside, tuple(mine), self)

    def place_of(self, member: int) -> int:
        """The place among the survivors of a rank of the job; that of the first survivor if the rank is lost."""
        return self.members.index(member) if member in self.members else 0

    def leave(self, dead: Sequence[int]) -> NoReturn:
        """Ends this process, whose island has lost ranks.

        Args:
            dead: those ranks.
        """
        self._leave(dead, others=len(self.members) > len(self._island_of(self._own)))

    def complete(self, collective: str, attempt: Callable[[], T]) -> T:
        """Makes a collective until it has succeeded on all ranks that are left. The attempts may be between peers.

        Args:
            collective: its name.
            attempt: makes it once, and receives in the memory `messages` alone. What it has received may be anything, even where
                MPI has raised nothing: it counts only when all agree that the attempt has succeeded.

        Returns:
            What the last attempt has returned.

        Raises:
            Exception: an attempt failed although no rank died.
        """
        while True:
            failure: Exception | None = None
            try:
                result = attempt()
            except DifferentCollectivesError as error:  # an answer as well, if all ranks have it
                failure = error
            except Exception as error:
                failure = error
                self._revoke()  # so that the others do not wait in it
            if self._agree(failure is None or isinstance(failure, DifferentCollectivesError)):
                self.messages.reuse()
                if failure is not None:
                    raise failure
                return result
            self.messages.abandon()
            if not self._leave_out_the_dead(collective):
                raise failure or RuntimeError("it failed on another rank")

    def _agree(self, succeeded: bool) -> bool:
        """Whether all ranks have succeeded, and none has died; the same on all."""
        try:
            return bool(self.ranks.Agree(int(succeeded)))
        except self._mpi.Exception:
            return False

    def _revoke(self) -> None:
        for ranks in filter(None, (self.ranks, self.peers)):
            ranks.Revoke()

    def _leave_out_the_dead(self, collective: str) -> bool:
        """Connects the survivors; whether anybody was missing."""
        self._revoke()
        while True:
            # A rank that dies meanwhile can make this fail on some ranks only; so they agree on it, too.
            try:
                alive, ranks, peers = self._connect()
                connected = True
            except self._mpi.Exception:
                connected = False
            self.ranks.Ack_failed()  # the dead ones: the agreement is then one about the connection
            if self._agree(connected):
                break
        if ranks is None:
            dead = [rank for rank in self._island_of(self._own) if rank not in alive]
            self._leave(dead, others=any(set(island) <= set(alive) for island in self.islands))
        self.ranks, self.peers, before = ranks, peers, self.members
        self.members = self._numbers_of(ranks)
        lost = tuple(rank for rank in before if rank not in self.members)
        if lost:
            self.losses.append(Loss(lost, tuple(self._hosts[rank] for rank in lost), len(self.members), collective))
        return bool(lost)

    def _connect(self) -> tuple[tuple[int, ...], Any, Any]:
        """Returns who is alive, and MPI's communicators of the ranks that go on and of the peers; None for ranks that leave."""
        ranks = self.ranks.Shrink()
        ranks.Set_errhandler(self._mpi.ERRORS_RETURN)
        alive = self._numbers_of(ranks)
        if not self.islands:
            return alive, ranks, None
        goes_on = set(self._island_of(self._own)) <= set(alive)
        connected = [ranks]
        try:
            connected.append(ranks.Split(0 if goes_on else self._mpi.UNDEFINED))
            if not goes_on:
                return alive, None, None
            return alive, connected[1], connected[1].Split(self._island_of(self._own).index(self._own))
        except self._mpi.Exception:
            for one in connected:
                one.Revoke()  # so that the others do not wait in it
            raise

    def _numbers_of(self, ranks: Any) -> tuple[int, ...]:
        """The ranks of one of MPI's communicators, as they are numbered in the job."""
        group = ranks.Get_group()
        return tuple(group.Translate_ranks(range(group.size), self._job))

    def _island_of(self, rank: int) -> Sequence[int]:
        return next(island for island in self.islands if rank in island)


class Peers:
    """The ranks that have this rank's place in their islands. Their collectives are agreed on by all ranks of the job.

    See `Survivors` for the attributes.
    """

    def __init__(self, job: Survivors) -> None:
        self._job = job
        self.complete = job.complete
        self.losses, self.messages = job.losses, job.messages

    @property
    def ranks(self) -> Any:
        """See `Survivors`."""
        return self._job.peers

    @property
    def members(self) -> tuple[int, ...]:
        """See `Survivors`."""
        return self._job._numbers_of(self.ranks)

    def place_of(self, member: int) -> int:
        """See `Survivors`."""
        members = self.members
        return members.index(member) if member in members else 0


class Island:
    """The ranks of this rank's island, which leave together: their collectives need no agreement, and nothing is repeated.

    Args:
        mpi: the module `mpi4py.MPI`.
        ranks: MPI's communicator of them.
        members: their numbers in the job.
        job: all ranks.

    See `Survivors` for the attributes.
    """

    losses: Sequence[Loss] = ()

    def __init__(self, mpi: Any, ranks: Any, members: tuple[int, ...], job: Survivors) -> None:
        self._mpi = mpi
        self._job = job
        self.ranks = ranks
        self.members = members
        self.place_of = members.index
        self.messages = job.messages

    def complete(self, collective: str, attempt: Callable[[], T]) -> T:
        """Makes a collective; this process ends with it if a rank has died."""
        try:
            result = attempt()
            self.messages.reuse()
            return result
        except self._mpi.Exception:
            self.ranks.Revoke()  # so that the others do not wait in it
            self.ranks.Ack_failed()
            failed = self.ranks.Get_failed()
            places = failed.Translate_ranks(range(failed.size), self.ranks.Get_group())
            dead = [self.members[place] for place in places]
            self._job.leave(dead)
