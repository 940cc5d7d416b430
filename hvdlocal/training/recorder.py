"""The records of a run in metrics.jsonl, and the status line on the console.

The fields are those of docs/records.md: counts and seconds are totals since the start of the run in every kind of record, but
for those of one round, which begin with `round_`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from hvdlocal.averaging import LocalOptimizer, SynchronousOptimizer
from hvdlocal.training.evaluation import Evaluation
from hvdlocal.training.memory import peak_memory
from hvdlocal.training.metrics import Metrics
from hvdlocal.training.pace import Mark, Pace
from hvdlocal.training.run_facts import RunFacts
from hvdlocal.training.run_state import RunState
from hvdlocal.training.session import Session
from hvdlocal.training.status_line import Status
from hvdlocal.training.survivors import Lost


@dataclass(frozen=True)
class Summary:
    """The result of a run. Counts are those of one rank unless they say otherwise.

    Attributes:
        facts: what the run was.
        evaluation: the last one.
        best_metric, best_value: the metric by which the best model was chosen, and its value in that model.
        ranks_lost: those that have died since the last start of the run, as they were numbered at its start.
        samples_per_second: of all ranks, over the whole run without its evaluations.
        memory: the peaks of rank 0 in the last start of the run.
        date: when the run ended, with its time zone.
    """

    facts: RunFacts
    evaluation: Evaluation
    best_metric: str
    best_value: float | None
    ranks_lost: list[int]
    steps: int
    micro_batches: int
    rounds: int
    progress: float
    scale_invariant_epochs: float
    data_epochs: float
    collectives: int
    bytes_sent: int
    island_bytes_sent: int
    data_parallel_bytes: int
    seconds: dict[str, float]
    samples_per_second: float
    memory: dict[str, int | None]
    date: str

    @property
    def communication_saved(self) -> float:
        """Share of the bytes that data parallelism would have sent between the workers, averaging the gradient of every
        micro-batch.
        """
        return 1 - self.bytes_sent / self.data_parallel_bytes if self.data_parallel_bytes else 0.0

    def record(self) -> dict[str, Any]:
        """Returns the summary as it is written to disk."""
        nested = ("facts", "evaluation", "memory")
        results = {name: value for name, value in vars(self).items() if name not in nested}
        return {
            **self.facts.record(),
            "evaluation": self.evaluation.record(),
            **results,
            **self.memory,
            "communication_saved": self.communication_saved,
        }


class Recorder:
    """Writes records about the state of an optimizer.

    Args:
        metrics: the file of records.
        optimizer, state, session: what is recorded.
    """

    def __init__(
        self,
        metrics: Metrics,
        optimizer: LocalOptimizer | SynchronousOptimizer,
        state: RunState,
        session: Session,
    ) -> None:
        self.metrics = metrics
        self._optimizer = optimizer
        self._state = state
        self._session = session
        self._totals = state.totals
        self._pace = Pace(session.length.budget, self._mark())
        self._memory: dict[str, int | None] = {}

    def begin(self) -> None:
        """Begins to measure the pace of training."""
        self._pace = Pace(self._session.length.budget, self._mark())

    @property
    def _epoch(self) -> float:
        return self._session.length.epoch

    def data_parallel_bytes(self, steps: int) -> int:
        """Returns the bytes that data parallelism would send in `steps` steps, averaging the gradient of every micro-batch."""
        ranks = self._session.communicator.job_size
        gradient_bytes = 4 * self._session.parameters if ranks > 1 else 0
        return gradient_bytes * steps * self._optimizer.accumulate

    def status(self) -> Status:
        """Returns the state of the run for a line on the console."""
        optimizer, progress = self._optimizer, self._optimizer.progress
        gpu = self._memory.get("peak_gpu_memory_bytes")
        return Status(
            epoch=progress / self._epoch,
            epochs=self._session.config.epochs,
            loss=optimizer.loss,
            base_lr=optimizer.param_groups[0]["lr"],
            gain=optimizer.gain,
            period=optimizer.period,
            ranks=self._session.communicator.size,
            samples_per_second=self._pace.samples_per_second,
            remaining_seconds=self._pace.remaining_seconds(progress, self._totals.elapsed),
            peak_memory_bytes=gpu if gpu is not None else self._memory.get("peak_memory_bytes"),
        )

    def round(self, steps: int) -> None:
        """Records the end of a round."""
        optimizer = self._optimizer
        self.metrics.write(
            "round",
            steps,
            round=optimizer.round,
            **self._now(),
            loss=optimizer.loss,
            divergence=optimizer.divergence,
            **self._totals.end_round(),
            elapsed_seconds=self._totals.elapsed,
        )

    def training(self, steps: int) -> None:
        """Records the training losses and the speed since the last such record."""
        self._pace.add(self._mark())
        self._memory = peak_memory(self._session.device)
        own = self._pace.samples_per_second
        self.metrics.write(
            "steps",
            steps,
            **self._now(),
            **self._state.meter.take(),
            divergence=self._optimizer.divergence,
            bytes_sent=self._totals.bytes_sent,
            island_bytes_sent=self._totals.island_bytes_sent,
            data_parallel_bytes=self.data_parallel_bytes(steps),
            **{f"{name}_seconds": seconds for name, seconds in self._totals.seconds().items()},
            remaining_seconds=self._pace.remaining_seconds(self._optimizer.progress, self._totals.elapsed),
            samples_per_second=None if own is None else own * self._session.communicator.size,
            samples_per_second_per_rank=own,
            **self._memory,
            **{f"loader_{name}": value for name, value in self._state.loader.stats().items()},
        )
        self.metrics.flush()

    def evaluation(self, evaluation: Evaluation, steps: int) -> None:
        """Records an evaluation."""
        progress = self._optimizer.progress
        self.metrics.write(
            "evaluation",
            steps,
            progress=progress,
            epoch=progress / self._epoch,
            data_epoch=self._state.loader.epoch,
            elapsed_seconds=self._totals.elapsed,
            bytes_sent=self._totals.bytes_sent,
            **evaluation.record(),
        )
        self.metrics.flush()

    def lost(self, lost: Lost, steps: int) -> None:
        """Records ranks that were lost."""
        progress = self._optimizer.progress
        self.metrics.write(
            "lost",
            steps,
            progress=progress,
            epoch=progress / self._epoch,
            data_epoch=self._state.loader.epoch,
            elapsed_seconds=self._totals.elapsed,
            ranks=lost.loss.ranks,
            hosts=lost.loss.hosts,
            remaining=lost.loss.remaining,
            collective=lost.loss.collective,
            round_samples_lost=lost.samples,
        )
        self.metrics.flush()

    def summary(self, facts: RunFacts, evaluation: Evaluation) -> Summary:
        """Returns the summary of a run that ends now."""
        optimizer, totals, steps = self._optimizer, self._totals, self._state.position.steps
        # The loader counts the samples of one rank since the number of ranks has changed; epochs are of all ranks.
        samples = self._state.loader.epoch * facts.training_samples
        return Summary(
            facts=facts,
            evaluation=evaluation,
            best_metric=self._session.task.best[0],
            best_value=self._state.position.best,
            ranks_lost=sorted(rank for loss in self._session.communicator.losses for rank in loss.ranks),
            steps=steps,
            micro_batches=steps * optimizer.accumulate,
            rounds=optimizer.round,
            progress=optimizer.progress,
            scale_invariant_epochs=optimizer.progress / self._epoch,
            data_epochs=self._state.loader.epoch,
            collectives=totals.collectives,
            bytes_sent=totals.bytes_sent,
            island_bytes_sent=totals.island_bytes_sent,
            data_parallel_bytes=self.data_parallel_bytes(steps),
            seconds=totals.seconds(),
            samples_per_second=samples / max(totals.elapsed - totals.evaluating, 1e-9),
            memory=peak_memory(self._session.device),
            date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )

    def _mark(self) -> Mark:
        samples = int(self._state.loader.stats()["samples"])
        return Mark(self._optimizer.progress, samples, self._totals.elapsed, self._totals.evaluating)

    def _now(self) -> dict[str, Any]:
        optimizer = self._optimizer
        lr = optimizer.param_groups[0]["lr"]
        return {
            "progress": optimizer.progress,
            "epoch": optimizer.progress / self._epoch,
            "data_epoch": self._state.loader.epoch,
            "base_lr": lr,
            "lr": lr * optimizer.gain,
            "gain": optimizer.gain,
            "period": optimizer.period,
            "grad_sqr": optimizer.grad_sqr,
            "grad_var": optimizer.grad_var,
        }
