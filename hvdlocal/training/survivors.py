"""How a run goes on without the ranks that die: what is lost with them, and whether those that are left are enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from hvdlocal.averaging import LocalOptimizer, SynchronousOptimizer
from hvdlocal.communicator import Communicator, Loss, MissingRanksError
from hvdlocal.data import Loader
from hvdlocal.training.interruption import Interrupted
from hvdlocal.training.run_state import RunState


class Lost(NamedTuple):
    """What a run has lost at once.

    Attributes:
        loss: the ranks.
        samples: that these ranks were given and that are in no average.
    """

    loss: Loss
    samples: int

    def __str__(self) -> str:
        """Returns a sentence for the console."""
        if not self.samples:
            return str(self.loss)
        given = "it was" if len(self.loss.ranks) == 1 else "they were"
        return f"{self.loss}, without the {self.samples:,} samples that {given} given since the last average"


class _Division(NamedTuple):
    """The ranks among which samples are divided, as they are numbered in the job, and the loader of this rank's share."""

    ranks: tuple[int, ...]
    loader: Loader


class Survivors:
    """Takes the ranks that die out of a run, on each of the others.

    Args:
        communicator: the ranks.
        min_workers: the fewest ranks that go on; with islands, the fewest islands.
        optimizer, state: of the run; `state` is divided anew after a loss.
    """

    def __init__(
        self,
        communicator: Communicator,
        min_workers: int,
        optimizer: LocalOptimizer | SynchronousOptimizer,
        state: RunState,
    ) -> None:
        self._communicator = communicator
        self._min_workers = min_workers
        self._optimizer = optimizer
        self._state = state
        self._divisions = [_Division(communicator.job_ranks, state.loader)]  # since the last average
        self._taken_in = len(communicator.losses)
        self._round = optimizer.round
        self._averaged = self._sent = state.loader.samples_consumed

    def take_in(self) -> list[Lost]:
        """Goes on without the ranks that were lost in the collectives since the last call.

        To be called between two steps, after each step and after everything else that is a collective.

        Returns:
            What was lost, the same on all survivors.
        """
        losses = self._communicator.losses[self._taken_in :]
        found = [Lost(loss, sum(map(self._samples_of, loss.ranks))) for loss in losses]
        if found:
            self._taken_in += len(found)
            self._state.redivide()
            self._divisions.append(_Division(self._communicator.job_ranks, self._state.loader))
        self._follow_averages()
        return found

    @property
    def too_few(self) -> str | None:
        """Why the run cannot go on; None while it can."""
        communicator = self._communicator
        workers, size = communicator.num_islands, communicator.size
        if workers >= self._min_workers:
            return None
        left = "one rank is" if size == 1 else f"{size} ranks are"
        islands = "" if communicator.island is None else f", in {workers} island{'s' if workers > 1 else ''}"
        return f"{left} left of {communicator.job_size}{islands}, fewer than min_workers={self._min_workers}"

    def _samples_of(self, rank: int) -> int:
        count, since = 0, self._averaged
        for ranks, loader in self._divisions:
            count += loader.samples_of(ranks.index(rank), since)
            since = max(since, loader.samples_consumed)
        return count

    def _follow_averages(self) -> None:
        """Notes up to where the samples are in an average of all ranks that are left."""
        optimizer, now = self._optimizer, self._state.loader.samples_consumed
        if optimizer.round != self._round:
            self._round, self._averaged, self._sent = optimizer.round, self._sent, now
        if optimizer.in_sync or (optimizer.round_under_way and optimizer.is_quiet):  # no average is under way
            self._averaged = self._sent
        while len(self._divisions) > 1 and self._divisions[0].loader.samples_consumed <= self._averaged:
            del self._divisions[0]


@contextmanager
def all_needed(communicator: Communicator) -> Iterator[None]:
    """Ends a run in which ranks are lost before training: within, no rank can do without another.

    Raises:
        Interrupted: on all ranks that are left.
    """
    try:
        with communicator.unbroken():
            yield
    except MissingRanksError as error:
        raise Interrupted(f"interrupted before training began: {error}. The same command starts again.") from error
