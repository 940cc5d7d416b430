"""The records of a run in metrics.jsonl, and the status line on the console.

The fields are those of docs/records.md: counts and seconds are totals since the start of the run in every kind of record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hvdlocal.averaging import LocalOptimizer, SynchronousOptimizer
from hvdlocal.data import Loader
from hvdlocal.training.accounting import RunTotals
from hvdlocal.training.evaluation import Evaluation
from hvdlocal.training.metrics import Metrics, TrainingMeter


@dataclass(frozen=True)
class Summary:
    """The result of a run. Counts are those of one rank unless they say otherwise."""

    evaluation: Evaluation
    steps: int
    micro_batches: int
    rounds: int
    progress: float
    scale_invariant_epochs: float
    data_epochs: float
    collectives: int
    bytes_sent: int
    data_parallel_bytes: int
    seconds: dict[str, float]

    @property
    def communication_saved(self) -> float:
        """Share of the bytes that data parallelism would have sent, averaging the gradient of every micro-batch."""
        return 1 - self.bytes_sent / self.data_parallel_bytes if self.data_parallel_bytes else 0.0

    def record(self) -> dict[str, Any]:
        """Returns the summary as it is written to disk."""
        fields = {name: value for name, value in vars(self).items() if name != "evaluation"}
        return {"evaluation": self.evaluation.record(), **fields, "communication_saved": self.communication_saved}


class Recorder:
    """Writes records about the state of an optimizer.

    Args:
        metrics: the file of records.
        optimizer, loader, totals: what is recorded.
        epoch: progress of one scale-invariant epoch.
        gradient_bytes: bytes that data parallelism would send for every micro-batch; 0 for one rank.
    """

    def __init__(
        self,
        metrics: Metrics,
        optimizer: LocalOptimizer | SynchronousOptimizer,
        loader: Loader,
        totals: RunTotals,
        epoch: float,
        gradient_bytes: int,
    ) -> None:
        self.metrics = metrics
        self._optimizer = optimizer
        self._loader = loader
        self._totals = totals
        self._epoch = epoch
        self._gradient_bytes = gradient_bytes

    def data_parallel_bytes(self, steps: int) -> int:
        """Returns the bytes that data parallelism would send in `steps` steps, averaging the gradient of every micro-batch."""
        return self._gradient_bytes * steps * self._optimizer.accumulate

    def status(self) -> str:
        """Returns the optimizer's state in a few words."""
        optimizer = self._optimizer
        loss = "" if optimizer.loss is None else f"loss {optimizer.loss:.4f}  "
        lr = optimizer.param_groups[0]["lr"]
        return f"{loss}lr {lr * optimizer.gain:.4g} = {lr:.4g}×{optimizer.gain:.2f}  H {optimizer.period}"

    def round(self, steps: int) -> None:
        """Records the end of a round."""
        optimizer = self._optimizer
        self.metrics.write(
            "round",
            steps,
            round=optimizer.round,
            **self._state(),
            loss=optimizer.loss,
            divergence=optimizer.divergence,
            averaging_seconds=self._totals.averaging,
            bytes_sent=self._totals.bytes_sent,
            elapsed_seconds=self._totals.elapsed,
        )

    def training(self, meter: TrainingMeter, steps: int) -> None:
        """Records the training losses since the last such record."""
        means = meter.take()
        self.metrics.write(
            "steps",
            steps,
            **self._state(),
            **means,
            divergence=self._optimizer.divergence,
            bytes_sent=self._totals.bytes_sent,
            data_parallel_bytes=self.data_parallel_bytes(steps),
            **{f"{name}_seconds": seconds for name, seconds in self._totals.seconds().items()},
            **{f"loader_{name}": value for name, value in self._loader.stats().items()},
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
            data_epoch=self._loader.epoch,
            elapsed_seconds=self._totals.elapsed,
            bytes_sent=self._totals.bytes_sent,
            **evaluation.record(),
        )
        self.metrics.flush()

    def summary(self, evaluation: Evaluation, steps: int) -> Summary:
        """Returns the summary of a run that ends now."""
        optimizer, totals = self._optimizer, self._totals
        return Summary(
            evaluation=evaluation,
            steps=steps,
            micro_batches=steps * optimizer.accumulate,
            rounds=optimizer.round,
            progress=optimizer.progress,
            scale_invariant_epochs=optimizer.progress / self._epoch,
            data_epochs=self._loader.epoch,
            collectives=totals.collectives,
            bytes_sent=totals.bytes_sent,
            data_parallel_bytes=self.data_parallel_bytes(steps),
            seconds=totals.seconds(),
        )

    def _state(self) -> dict[str, Any]:
        optimizer = self._optimizer
        lr = optimizer.param_groups[0]["lr"]
        return {
            "progress": optimizer.progress,
            "epoch": optimizer.progress / self._epoch,
            "data_epoch": self._loader.epoch,
            "base_lr": lr,
            "lr": lr * optimizer.gain,
            "gain": optimizer.gain,
            "period": optimizer.period,
            "grad_sqr": optimizer.grad_sqr,
            "grad_var": optimizer.grad_var,
        }
