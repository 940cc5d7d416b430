"""What a run says about itself while it trains: records in metrics.jsonl, and the line that a person sees.

The fields are those of docs/records.md: counts and seconds are totals since the start of the run in every kind of record.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hvdlocal.averaging import LocalOptimizer, SynchronousOptimizer
from hvdlocal.data import Loader
from hvdlocal.training.accounting import RunTotals, TrainingMeter
from hvdlocal.training.evaluation import Evaluation
from hvdlocal.training.metrics import Metrics


class Recorder:
    """Writes records of the state of an optimizer.

    Args:
        metrics: where to.
        optimizer, loader, totals: what is recorded.
        epoch: progress of one scale-invariant epoch.
        gradient_bytes: what data parallelism would send for every micro-batch; 0 for one rank.
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
        self._ledger = totals
        self._epoch = epoch
        self._gradient_bytes = gradient_bytes

    def data_parallel_bytes(self, steps: int) -> int:
        """What data parallelism would have sent in so many optimizer steps, averaging the gradient of every micro-batch."""
        return self._gradient_bytes * steps * self._optimizer.accumulate

    def status(self) -> str:
        """The optimizer's state in a few words."""
        optimizer = self._optimizer
        loss = "" if optimizer.loss is None else f"loss {optimizer.loss:.4f}  "
        lr = optimizer.param_groups[0]["lr"]
        return f"{loss}lr {lr * optimizer.gain:.4g} = {lr:.4g}×{optimizer.gain:.2f}  H {optimizer.period}"

    def round(self, steps: int) -> None:
        """A round has ended."""
        optimizer = self._optimizer
        self.metrics.write(
            "round",
            steps,
            round=optimizer.round,
            **self._state(),
            loss=optimizer.loss,
            divergence=optimizer.divergence,
            averaging_seconds=optimizer.seconds_averaging,
            bytes_sent=self._ledger.bytes_sent,
            elapsed_seconds=self._ledger.elapsed,
        )

    def window(self, window: TrainingMeter, steps: int) -> None:
        """The training losses since the last such record."""
        loss, accuracy = window.take()
        self.metrics.write(
            "steps",
            steps,
            **self._state(),
            loss=loss,
            accuracy=accuracy,
            divergence=self._optimizer.divergence,
            bytes_sent=self._ledger.bytes_sent,
            data_parallel_bytes=self.data_parallel_bytes(steps),
            **{f"{name}_seconds": seconds for name, seconds in self._ledger.seconds().items()},
            **{f"loader_{name}": value for name, value in self._loader.stats().items()},
        )
        self.metrics.flush()

    def evaluation(self, evaluation: Evaluation, steps: int) -> None:
        """The average was evaluated."""
        progress = self._optimizer.progress
        self.metrics.write(
            "evaluation",
            steps,
            progress=progress,
            epoch=progress / self._epoch,
            data_epoch=self._loader.epoch,
            elapsed_seconds=self._ledger.elapsed,
            bytes_sent=self._ledger.bytes_sent,
            **asdict(evaluation),
        )
        self.metrics.flush()

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
