"""Starts and completes checkpoints in the background, and ends the run in an orderly way on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdlocal.communicator import Communicator
from hvdlocal.directory import Directory
from hvdlocal.terminal import warn
from hvdlocal.training import interruption
from hvdlocal.training.accounting import RunTotals
from hvdlocal.training.checkpoint.files import directory
from hvdlocal.training.checkpoint.interval import CheckpointInterval
from hvdlocal.training.checkpoint.writer import CheckpointWriter
from hvdlocal.training.config import CheckpointConfig
from hvdlocal.training.run_files import CHECKPOINTS
from hvdlocal.training.status_exchange import POLL_SECONDS, Status, StatusExchange


class CheckpointCoordinator:
    """One rank's part in writing the checkpoints of a run.

    In a job that goes on without ranks that die, a checkpoint that was open then is not completed. Where ranks are lost in a
    collective of `after_step` or `stop`, no other checkpoint is begun before the caller has made the run one of the ranks that
    are left, and has called `after_loss`.

    Args:
        communicator: the ranks.
        config: how often to write checkpoints, and how many to keep.
        output: the directory of the run.
        deadline: when the process must have ended; only that of the first rank counts.
        totals: the clock of the run; it also notes what is not training.
        state: returns this rank's state, which is copied.
        contents: returns the manifest's contents beside the files; called on rank 0 only.
        written: is called with the step of each checkpoint that is complete on disk.
        is_quiet: returns whether collectives may be waited for after this step, the same on all ranks; all that is not due at an
            exact step is put off to where they may.

    Attributes:
        status: exchanges requests to stop between the ranks.
        writer: writes the checkpoints.
        stop_reason: why this rank asks the run to stop; None while it does not.
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
        written: Callable[[int], object] = lambda step: None,
        is_quiet: Callable[[], bool] = lambda: True,
    ) -> None:
        self._communicator = communicator
        self._every_steps = config.every_steps
        self._output = output
        self._deadline = deadline
        self._totals = totals
        self._state = state
        self._contents = contents
        self._written = written
        self._is_quiet = is_quiet
        self._unreported: int | None = None
        self.stop_reason: str | None = None
        self.status = StatusExchange(communicator)
        self._interval = CheckpointInterval(config)
        self._cost = 0.0
        self._steps = 0
        self._losses = len(communicator.losses)
        self._hurried = False
        self._asked = False  # whether an exchange has been started since the last checkpoint was begun or finished
        self._last_exchange = 0.0
        self.writer = CheckpointWriter(communicator, output, config.keep)

    def start(self) -> None:
        """Starts the clock of checkpoints: training begins or continues now."""
        self._interval.start(self._totals.elapsed)
        self._last_exchange = self._totals.elapsed

    def after_step(self, steps: int) -> None:
        """Begins or completes a checkpoint, or ends the run, if that is due; to be called on all ranks after every step.

        Args:
            steps: optimizer steps done.

        Raises:
            Interrupted: on all ranks: one rank was asked to stop, or the time is over.
            OSError: the run must stop, but the checkpoint could not be written.
            MovedError: on rank 0: the directory of the run is not where it was.
        """
        self._steps = steps
        if self._every_steps is not None and steps % self._every_steps == 0:
            if self.writer.open_step is not None:
                self._finish()
            self._begin(steps)
        if not (self.status.is_at(steps) and self._is_quiet()):
            return
        if self._communicator.rank == 0:
            self._output.check()
        self._warn_of_failures()
        if not self.writer.is_writing:
            self._report()
        with self._totals.beside_training():
            start = self._totals.elapsed
            news = self.status.exchange(steps, start, self._news())
            self._totals.waited(self._totals.elapsed - start)
        idle, self._asked = self._asked and news is not None and not news.writing, True
        if news is None:
            return
        if news.stop:
            self.stop(steps)
        elif self.writer.open_step is not None:
            if idle:
                self._finish()
        elif news.due and idle:
            self._begin(steps)

    def after_loss(self) -> None:
        """Goes on after ranks have died; to be called at the same step on all ranks that are left.

        Another checkpoint is due: the first one of these ranks.
        """
        self._losses = len(self._communicator.losses)
        self.writer.after_loss(self._steps)
        self._hurried = True

    def finish(self) -> None:
        """Completes all writing after the last step; a collective."""
        self.status.close()
        if self.writer.open_step is not None:
            self._finish(wait=True)
        if self._has_lost:
            self.after_loss()
        self.writer.close()
        self._report()
        self._warn_of_failures(wait=True)

    def _news(self) -> Status:
        first = self._communicator.rank == 0
        now = self._totals.elapsed
        gap, self._last_exchange = now - self._last_exchange, now  # a single step may take longer than POLL_SECONDS
        out_of_time = first and self._deadline.passes_within(2 * self.writer.write_seconds + POLL_SECONDS + 2 * gap)
        return Status(
            stop=self.stop_reason is not None or interruption.received() is not None or out_of_time,
            due=first and (self._hurried or self._interval.due(self._totals.elapsed)),
            writing=self.writer.is_writing,
        )

    @property
    def _has_lost(self) -> bool:
        """Whether ranks were lost that the caller has not taken in."""
        return len(self._communicator.losses) > self._losses

    def _begin(self, steps: int) -> None:
        start = self._totals.elapsed
        state = self._state()  # which may be a collective
        if self._has_lost:
            return
        self._asked = self._hurried = False
        self.writer.begin(steps, state, self._contents() if self._communicator.rank == 0 else {})
        self._cost = self._totals.elapsed - start
        self._interval.start(self._totals.elapsed)

    def _finish(self, wait: bool = False) -> str | None:
        self._asked = False
        start, step = self._totals.elapsed, self.writer.open_step
        with self._totals.beside_training():
            problem = self.writer.finish(wait)
        self._interval.learn(self._cost + self._totals.elapsed - start, self.writer.write_seconds)
        if problem and self._communicator.rank == 0:
            warn(f"{problem}. Training goes on.")
        self._report()  # the one before, which the same thread has completed
        self._unreported = step if problem is None else None
        if wait:
            self._report()
        return problem

    def _report(self) -> None:
        """Reports the last checkpoint, which is complete on disk unless that failed."""
        step, self._unreported = self._unreported, None
        if step is None:
            return
        if self._communicator.rank or directory(self._output.path / CHECKPOINTS, step).exists():
            self._written(step)

    def stop(self, steps: int, why: str | None = None) -> None:
        """Ends the run with a checkpoint of this step; a collective. Returns if ranks are lost before there is one.

        Args:
            steps: optimizer steps done.
            why: the same on all ranks; by default what the ranks were asked.

        Raises:
            Interrupted, OSError, MovedError: as `after_step`.
        """
        self._steps = steps
        self.status.close()
        problem = None
        if (saved := self.writer.open_step) is not None:
            problem = self._finish(wait=True)
        if problem or saved != steps:
            self._begin(steps)
            if self.writer.open_step is None:
                return
            problem = self.writer.finish(wait=True)
            if problem and self._has_lost:
                return
            self._unreported = steps
            self._report()
        self.writer.close()
        self._warn_of_failures(wait=True)
        if self._communicator.rank == 0:
            self._output.check()
        signal = interruption.received()
        asked = self._communicator.gather(self.stop_reason or (signal and signal.name), "hvdlocal.interruption")
        reasons = [f"{reason} on rank {rank}" for rank, reason in enumerate(asked) if reason is not None]
        reason = why or (reasons[0] if reasons else "the time is over")
        if problem:
            raise OSError(f"{reason}, but {problem}")
        raise interruption.Interrupted(
            f"interrupted after step {steps}: {reason}. The checkpoint is in {self._output.path / CHECKPOINTS}; "
            "the same command continues from it."
        )

    def _warn_of_failures(self, wait: bool = False) -> None:
        for problem in self.writer.failures(wait):
            warn(f"could not be written or removed: {problem}")
