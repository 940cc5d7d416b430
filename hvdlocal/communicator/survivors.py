"""How the ranks that are left repeat a collective in which others have died.

A collective of MPI may succeed on some ranks and fail on others. So all agree on it afterwards; if it failed anywhere, the
survivors connect anew and repeat it. All survivors do so in the same collective, and thus have the same losses.

Source: Bland, Bouteiller, Herault, Bosilca and Dongarra, "Post-failure recovery of MPI communication capability: design and
rationale", IJHPCA 27 (2013); chapter "User-level failure mitigation" of its proposal for the MPI standard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hvdlocal.communicator.losses import Loss
from hvdlocal.communicator.threaded import DifferentCollectivesError
from hvdlocal.communicator.undo import MessageMemory, Undo

T = TypeVar("T")


class Survivors:
    """The ranks of a job that are left. All but reading its attributes is for the thread that makes the collectives.

    Args:
        mpi: the module `mpi4py.MPI`.
        ranks: MPI's communicator of all ranks of the job.
        hosts: that of every rank.

    Attributes:
        ranks: MPI's communicator of them.
        members: their numbers in the job, ascending.
        losses: the ranks that died so far.
        messages: the memory that attempts give to MPI.
        undo: what attempts have overwritten.
    """

    def __init__(self, mpi: Any, ranks: Any, hosts: Sequence[str]) -> None:
        self._mpi = mpi
        self._job = ranks.Get_group()
        self._hosts = hosts
        self.ranks = ranks
        self.members = tuple(range(ranks.size))
        self.losses: list[Loss] = []
        self.messages = MessageMemory()
        self.undo = Undo()

    def place_of(self, member: int) -> int:
        """The place among the survivors of a rank of the job; that of the first survivor if the rank is lost."""
        return self.members.index(member) if member in self.members else 0

    def complete(self, collective: str, attempt: Callable[[], T]) -> T:
        """Makes a collective until it has succeeded on all ranks that are left.

        Args:
            collective: its name.
            attempt: makes it once, in the memory `messages`, and overwrites other memory by `undo`. What it has received may be
                anything, even where MPI has raised nothing: what comes of it counts only when all agree that it has succeeded.

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
                self.ranks.Revoke()  # so that the others do not wait in it
            if self._agree(failure is None or isinstance(failure, DifferentCollectivesError)):
                self.messages.reuse()
                self.undo.forget()
                if failure is not None:
                    raise failure
                return result
            self.messages.abandon()
            self.undo.roll_back()
            if not self._leave_out_the_dead(collective):
                raise failure or RuntimeError("it failed on another rank")

    def _agree(self, succeeded: bool) -> bool:
        """Whether all ranks have succeeded, and none has died; the same on all."""
        try:
            return bool(self.ranks.Agree(int(succeeded)))
        except self._mpi.Exception:
            return False

    def _leave_out_the_dead(self, collective: str) -> bool:
        """Connects the survivors; whether anybody was missing."""
        self.ranks.Revoke()
        while True:
            # A rank that dies meanwhile can make this fail on some ranks only; so they agree on it, too.
            try:
                ranks = self.ranks.Shrink()
            except self._mpi.Exception:
                ranks = None
            self.ranks.Ack_failed()  # the dead ones: the agreement is then one about the connection
            if self._agree(ranks is not None):
                break
        ranks.Set_errhandler(self._mpi.ERRORS_RETURN)
        group = ranks.Get_group()
        members = tuple(group.Translate_ranks(range(group.size), self._job))
        lost = tuple(rank for rank in self.members if rank not in members)
        self.ranks, self.members = ranks, members
        if lost:
            self.losses.append(Loss(lost, tuple(self._hosts[rank] for rank in lost), len(members), collective))
        return bool(lost)
