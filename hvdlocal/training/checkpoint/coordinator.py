"""So that nothing is lost: begins and completes checkpoints beside the training, and leaves in order when asked to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdlocal.communicator import Communicator
from hvdlocal.directory import Directory
from hvdlocal.terminal import warn
from hvdlocal.training import interruption
from hvdlocal.training.accounting import RunTotals
from hvdlocal.training.checkpoint.interval import CheckpointInterval
from hvdlocal.training.checkpoint.writer import CheckpointWriter
from hvdlocal.training.config import CheckpointConfig
from hvdlocal.training.output_directory import CHECKPOINTS
from hvdlocal.training.status_exchange import POLL_SECONDS, Status, StatusExchange


class Interrupted(Exception):  # noqa: N818  (no error: the run goes on later)
    """The run was asked to stop, and its checkpoint is on disk: the same command continues it. Raised on all ranks."""


class CheckpointCoordinator:
    """One rank's part in keeping a run.

    Args:
        communicator: the ranks.
        config: how often, and how many.
        output: directory of the run.
        deadline: by which the process must have left; only rank 0's counts.
        totals: times the run, and is told what is not training.
        state: this rank's state, to be copied.
        contents: what the manifest says beside the files; asked on rank 0 only.
    """

    def __init__(
        self,
        communicator: Communicator,
        config: CheckpointConfig,
        output: Directory,
        deadline: interruption.Deadline,
        totals: RunTotals,
        state: Callable[[], dict[str, Any]],
        contents: Callable[[], dict[str, Any]],
    ) -> None:
        self._communicator = communicator
        self._every_steps = config.every_steps
        self._output = output
        self._deadline = deadline
        self._ledger = totals
        self._state = state
        self._contents = contents
        self._poll = StatusExchange(communicator)
        self._pace = CheckpointInterval(config)
        self._cost = 0.0
        self._asked = False  # whether a poll has been begun since the last checkpoint was begun or finished
        self._polled = 0.0
        self.writer = CheckpointWriter(communicator, output, config.keep)

    def start(self) -> None:
        """Training begins, or goes on."""
        self._pace.start(self._ledger.elapsed)
        self._polled = self._ledger.elapsed

    def after_step(self, steps: int) -> None:
        """Does what is due after so many optimizer steps; to be called on all ranks.

        Raises:
            Interrupted: on all ranks: one was asked to stop, or the time is over.
            OSError: so it is, but the checkpoint could not be written.
            MovedError: on rank 0: the directory of the run is not where it was.
        """
        if self._every_steps is not None and steps % self._every_steps == 0:
            if self.writer.open_step is not None:
                self._finish()
            self._begin(steps)
        if not self._poll.is_at(steps):
            return
        if self._communicator.rank == 0:
            self._output.check()
        self._warn_of_failures()
        with self._ledger.beside_training():
            start = self._ledger.elapsed
            news = self._poll.exchange(steps, start, self._news())
            self._ledger.waited(self._ledger.elapsed - start)
        idle, self._asked = self._asked and news is not None and not news.writing, True
        if news is None:
            return
        if news.stop:
            self._leave(steps)
        elif self.writer.open_step is not None:
            if idle:
                self._finish()
        elif news.due and idle:
            self._begin(steps)

    def finish(self) -> None:
        """Training has ended by itself; a collective. What the background thread was given is on disk afterwards."""
        self._poll.close()
        if self.writer.open_step is not None:
            self._finish(wait=True)
        self.writer.close()
        self._warn_of_failures(wait=True)

    def _news(self) -> Status:
        first = self._communicator.rank == 0
        now = self._ledger.elapsed
        gap, self._polled = now - self._polled, now  # a single step may take longer than POLL_SECONDS
        out_of_time = first and self._deadline.passes_within(2 * self.writer.write_seconds + POLL_SECONDS + 2 * gap)
        return Status(
            stop=interruption.received() is not None or out_of_time,
            due=first and self._pace.due(self._ledger.elapsed),
            writing=self.writer.is_writing,
        )

    def _begin(self, steps: int) -> None:
        self._asked = False
        start = self._ledger.elapsed
        self.writer.begin(steps, self._state(), self._contents() if self._communicator.rank == 0 else {})
        self._cost = self._ledger.elapsed - start
        self._pace.start(self._ledger.elapsed)

    def _finish(self, wait: bool = False) -> str | None:
        self._asked = False
        start = self._ledger.elapsed
        with self._ledger.beside_training():
            problem = self.writer.finish(wait)
        self._pace.learn(self._cost + self._ledger.elapsed - start, self.writer.write_seconds)
        if problem and self._communicator.rank == 0:
            warn(f"{problem}. Training goes on.")
        return problem

    def _leave(self, steps: int) -> None:
        """Ends the run with a checkpoint of this very step."""
        self._poll.close()
        problem = None
        if (saved := self.writer.open_step) is not None:
            problem = self._finish(wait=True)
        if problem or saved != steps:
            self._begin(steps)
            problem = self.writer.finish(wait=True)
        self.writer.close()
        self._warn_of_failures(wait=True)
        if self._communicator.rank == 0:
            self._output.check()
        asked = self._communicator.gather(interruption.received(), "hvdlocal.interruption")
        reasons = [f"{signal.name} on rank {rank}" for rank, signal in enumerate(asked) if signal is not None]
        reason = reasons[0] if reasons else "the time is over"
        if problem:
            raise OSError(f"{reason}, but {problem}")
        raise Interrupted(
            f"interrupted after step {steps}: {reason}. The checkpoint is in {self._output.path / CHECKPOINTS}; "
            "the same command continues from it."
        )

    def _warn_of_failures(self, wait: bool = False) -> None:
        for problem in self.writer.failures(wait):
            warn(f"could not be written or removed: {problem}")
