"""A job that survives, as threads of one process: a test says at which collective which ranks die.

The ranks of a real job die at any time; what the others see of it is always the same: a collective to which a rank did not
contribute. So a rank dies here as it enters a collective, which makes every run the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hvdlocal.communicator.base import Communicator
from hvdlocal.communicator.groups import Groups
from hvdlocal.communicator.losses import Loss

DEADLINE_SECONDS = 60.0


@dataclass(frozen=True)
class Death:
    """A rank ends as it enters a collective.

    Attributes:
        rank: as it is numbered in the job.
        collective: the collective's name, or the beginning of it.
        occurrence: which of this rank's collectives of that name, 1 for the first.
    """

    rank: int
    collective: str
    occurrence: int = 1


class Died(BaseException):
    """In place of SIGKILL; nothing of the rank's program must catch it."""


def run_mortal(size: int, body: Callable[[Communicator], Any], *deaths: Death) -> list[Any]:
    """Runs `body` on every rank of a job, each in a thread with a communicator of its own.

    Returns:
        What `body` returned, by rank of the job; None for a rank that died.

    Raises:
        What `body` raised on the first rank on which it failed.
    """
    job = _Job(size)
    results: list[Any] = [None] * size
    errors: dict[int, BaseException] = {}

    def rank_of_job(rank: int) -> None:
        communicator = MortalCommunicator(job, rank, [death for death in deaths if death.rank == rank])
        try:
            results[rank] = body(communicator)
        except Died:
            pass
        except BaseException as error:
            errors[rank] = error
        finally:
            job.end(rank)

    threads = [threading.Thread(target=rank_of_job, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLINE_SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    if errors:
        raise errors[min(errors)]
    return results


@dataclass
class _Collective:
    """What the ranks have brought to a collective, by rank, and who is missing once that is decided."""

    name: str
    brought: dict[int, Any] = field(default_factory=dict)


class _Job:
    """What the threads share: the collectives in the order in which every rank calls them, and the ranks that have ended."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Lock()
        self._collectives: list[_Collective] = []
        self._ended: dict[int, int] = {}  # rank -> collectives that it took part in

    def end(self, rank: int) -> None:
        with self._lock:
            self._ended.setdefault(rank, sum(rank in one.brought for one in self._collectives))

    def bring(self, number: int, name: str, rank: int, value: Any) -> None:
        with self._lock:
            if number == len(self._collectives):
                self._collectives.append(_Collective(name))
            expected = self._collectives[number].name
            assert name == expected, f"rank {rank} asks for {name!r}, others for {expected!r}"
            self._collectives[number].brought[rank] = value

    def complete(self, number: int) -> bool:
        """Whether every rank has brought something, or has ended before it could."""
        with self._lock:
            brought = self._collectives[number].brought
            return all(rank in brought or self._ended.get(rank, number + 1) <= number for rank in range(self.size))

    def brought(self, number: int) -> dict[int, Any]:
        """What was brought to a complete collective, in the order of the ranks."""
        with self._lock:
            return dict(sorted(self._collectives[number].brought.items()))

    def losses(self, until: int) -> list[Loss]:
        """The losses up to a complete collective."""
        found, present = [], set(range(self.size))
        for one in self._collectives[: until + 1]:
            if missing := present - one.brought.keys():
                present -= missing
                lost = tuple(sorted(missing))
                found.append(Loss(lost, tuple(f"node{rank}" for rank in lost), len(present), one.name))
        return found


class MortalCommunicator(Communicator):
    """One rank of `run_mortal`. See `Communicator`."""

    backend = "mpi4py"
    survives = True

    def __init__(self, job: _Job, rank: int, deaths: Sequence[Death]) -> None:
        super().__init__(rank, job.size, 0, 1, DEADLINE_SECONDS)
        self._job = job
        self._own = rank
        self._deaths = deaths
        self._entered: list[str] = []

    def shutdown(self) -> None:
        """See `Communicator`. There is nothing to leave."""

    def abort(self, exit_code: int) -> None:
        """See `Communicator`."""
        raise AssertionError(f"rank {self._own} aborts with {exit_code}")

    def _join_group(self, groups: Groups, name: str) -> None:
        raise NotImplementedError

    def _start_sum(self, flat: torch.Tensor, name: str) -> _Pending:
        def use(brought: dict[int, Any]) -> None:
            flat.copy_(sum(brought.values()))  # in the order of the ranks, so that all get the same bits

        return self._bring(name, flat.clone(), use)

    def _start_broadcast(self, flat: torch.Tensor, name: str, root: int) -> _Pending:
        sender = self.job_ranks[root]

        def use(brought: dict[int, Any]) -> None:
            flat.copy_(brought[sender if sender in brought else min(brought)])

        return self._bring(name, flat.clone(), use)

    def _gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        return self._wait(self._bring(name, data, lambda brought: list(brought.values())), name)

    def _bring(self, name: str, value: Any, use: Callable[[dict[int, Any]], Any]) -> _Pending:
        self._entered.append(name)
        for death in self._deaths:
            # Not `==`: pieces and slices add numbers to the name.
            entered = sum(one.startswith(death.collective) for one in self._entered)
            if name.startswith(death.collective) and entered == death.occurrence:
                raise Died
        number = len(self._entered) - 1
        self._job.bring(number, name, self._own, value)
        return _Pending(self, number, use)

    def _take_in(self, number: int) -> None:
        """Makes the view of this rank that after a collective which it has waited for."""
        losses = self._job.losses(number)
        if len(losses) <= len(self.losses):
            return
        self.losses.extend(losses[len(self.losses) :])
        lost = {rank for one in self.losses for rank in one.ranks}
        self.job_ranks = tuple(rank for rank in range(self.job_size) if rank not in lost)
        self.rank, self.size = self.job_ranks.index(self._own), len(self.job_ranks)


class _Pending:
    """A collective under way."""

    def __init__(self, communicator: MortalCommunicator, number: int, use: Callable[[dict[int, Any]], Any]) -> None:
        self._communicator = communicator
        self._number = number
        self._use = use

    def done(self) -> bool:
        return self._communicator._job.complete(self._number)

    def finish(self) -> Any:
        result = self._use(self._communicator._job.brought(self._number))
        self._communicator._take_in(self._number)
        return result
