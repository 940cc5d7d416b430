"""What changes while a run trains, in memory and in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from hvdlocal.averaging import LocalOptimizer, SynchronousOptimizer
from hvdlocal.import_path import code_digests
from hvdlocal.training.accounting import RunTotals
from hvdlocal.training.builders import code_paths
from hvdlocal.training.checkpoint.replica_state import ReplicaState
from hvdlocal.training.checkpoint.resume import Resumed
from hvdlocal.training.config import flatten
from hvdlocal.training.config_checks import effective_settings
from hvdlocal.training.environment import versions
from hvdlocal.training.evaluation import Evaluation
from hvdlocal.training.metrics import TrainingMeter
from hvdlocal.training.optimizers import follow_ranks
from hvdlocal.training.run_files import first_difference
from hvdlocal.training.session import Session
from hvdlocal.training.step import TrainingStep
from hvdlocal.training.tasks import Batch


@dataclass
class Position:
    """Where a run stands; the same on every rank.

    Attributes:
        next_evaluation: progress at which the next evaluation is due.
        steps: optimizer steps done.
        evaluation, evaluated_at: the last evaluation, and the progress at which it was made.
        best: the best value so far of the task's metric; None before the first evaluation.
    """

    next_evaluation: float
    steps: int = 0
    evaluation: Evaluation | None = None
    evaluated_at: float = -1.0
    best: float | None = None

    def is_better(self, value: float | None, direction: str) -> bool:
        """Returns whether a value is better than the best so far; NaN never is.

        Args:
            value: of the task's metric.
            direction: "max" if large values are good, else "min".
        """
        if value is None or math.isnan(value):
            return False
        return self.best is None or (value > self.best if direction == "max" else value < self.best)

    def record(self) -> dict[str, Any]:
        """Returns plain values for a manifest."""
        evaluation = None if self.evaluation is None else self.evaluation.record()
        return {**vars(self), "evaluation": evaluation}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Position:
        """Returns what `record` described."""
        evaluation = record["evaluation"]
        return cls(**{**record, "evaluation": None if evaluation is None else Evaluation.from_record(evaluation)})


class RunState:
    """One rank's part of what a run must not lose: model, optimizer, random state, data position, totals.

    Args:
        session: data, model and settings.
        optimizer: trains the model.
        step: holds the gradient scaler.

    Attributes:
        loader: the training batches.
        totals: time and traffic so far.
        meter: means of losses and accuracies since the last line of the log.
        position: where the run stands.
        next_line: seconds of training after which the next line of the log is due.
    """

    def __init__(self, session: Session, optimizer: LocalOptimizer | SynchronousOptimizer, step: TrainingStep) -> None:
        self._session = session
        self._optimizer = optimizer
        self._replica = ReplicaState(optimizer, session.device)
        self._scaler = step.scaler
        self.loader = session.loader
        self.totals = RunTotals(optimizer)
        self.meter = TrainingMeter(session.device)
        self.position = Position(next_evaluation=session.config.evaluate_every_epochs * session.length.epoch)
        self.next_line = session.config.log_every_seconds

    def batches(self) -> Generator[Batch, None, None]:
        """Yields this rank's batches without end; after `redivide` those of its new share. Batches prepared ahead are dropped."""
        while True:
            loader = self.loader
            with closing(loader.endless()) as batches:
                while self.loader is loader:
                    yield next(batches)

    def redivide(self) -> None:
        """Goes on between two steps with the ranks that are left, as a resumption on so many would.

        All samples that were not handed out yet are divided among these ranks. Epoch, budget, schedule and rules are those of so
        many ranks, and progress is counted in their steps.
        """
        before, session, position = self.loader, self._session, self.position
        self.loader = session.new_loader(order=before.order)
        self.loader.load_state_dict(before.state_dict())
        self.loader.count_from(before.stats())
        scale = session.redivide(self.loader)
        position.next_evaluation *= scale
        position.evaluated_at *= scale
        follow_ranks(self._optimizer, session.config, session.length, self._optimizer.progress * scale)

    def of_rank(self) -> dict[str, Any]:
        """Returns what this rank needs to continue. What is the same on all ranks is left to rank 0."""
        return {
            **self._replica.of_rank(),
            "scaler": self._scaler.state_dict(),
            "ledger": self.totals.state_dict(),  # under the name that checkpoints have borne from the beginning
            "window": self.meter.state_dict(),
            "next_line": self.next_line,
            "loader_stats": self.loader.stats(),
        }

    def of_all_ranks(self) -> dict[str, Any]:
        """Returns the numbers that are the same on all ranks, for the manifest."""
        return {
            **self._replica.of_all_ranks(),
            "progress_of_an_epoch": self._session.length.epoch,
            "position": self.position.record(),
            "loader": self.loader.state_dict(),
            "settings": flatten(self._session.config),
            "fingerprints": self._session.fingerprints,
            "versions": versions(),
            "code": code_digests(code_paths(self._session.config)),
        }

    def mismatch(self, manifest: Mapping[str, Any]) -> str | None:
        """Says why a checkpoint cannot be continued with this configuration and these data; None if it can."""
        if difference := first_difference(manifest["settings"], effective_settings(self._session.config)):
            return f"was written {difference}"
        for split, fingerprint in self._session.fingerprints.items():
            if (before := manifest["fingerprints"][split]) != fingerprint:
                return f"was written with other {split} data (fingerprint {before[:12]}, now {fingerprint[:12]})"
        return None

    def restore(self, resumed: Resumed) -> None:
        """Continues from a checkpoint."""
        manifest = resumed.contents
        order = manifest["loader"]["order"]
        if self._session.config.data.order == "auto" and order != self.loader.state_dict()["order"]:
            # This node stores the data in another way than that before, for which another order would be faster.
            self.loader = self._session.new_loader(order=order)
        self.loader.load_state_dict(manifest["loader"])
        self.position = Position.from_record(manifest["position"])
        scale = self._session.length.epoch / manifest["progress_of_an_epoch"]
        self._replica.restore(resumed, scale)
        state = resumed.common
        if resumed.state is not None:
            self.meter.load_state_dict(state["window"])
            self.next_line = state["next_line"]
            self.loader.count_from(state["loader_stats"])
        else:  # whose progress has another unit
            self.position.next_evaluation *= scale
            self.position.evaluated_at *= scale
        self._scaler.load_state_dict(state["scaler"])
        self.totals.load_state_dict(state["ledger"])
