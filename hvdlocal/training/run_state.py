"""What changes while a run trains, in memory and in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hvdlocal.averaging import LocalOptimizer, SynchronousOptimizer
from hvdlocal.training.accounting import RunTotals
from hvdlocal.training.checkpoint.resume import Resumed
from hvdlocal.training.config_checks import effective_settings, flatten
from hvdlocal.training.environment import versions
from hvdlocal.training.evaluation import Evaluation
from hvdlocal.training.metrics import TrainingMeter
from hvdlocal.training.run_files import first_difference
from hvdlocal.training.session import Session
from hvdlocal.training.step import TrainingStep


@dataclass
class Position:
    """Where a run stands; the same on every rank.

    Attributes:
        next_evaluation: progress at which the next evaluation is due.
        steps: optimizer steps done.
        evaluation, evaluated_at: the last evaluation, and the progress at which it was made.
        best: the best accuracy so far.
    """

    next_evaluation: float
    steps: int = 0
    evaluation: Evaluation | None = None
    evaluated_at: float = -1.0
    best: float = -1.0


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
        self._scaler = step.scaler
        self.loader = session.loader
        self.totals = RunTotals(optimizer)
        self.meter = TrainingMeter(session.device)
        self.position = Position(next_evaluation=session.config.evaluate_every_epochs * session.length.epoch)
        self.next_line = session.config.log_every_seconds

    def of_rank(self) -> dict[str, Any]:
        """Returns what this rank needs to continue. What is the same on all ranks is left to rank 0."""
        model, device = self._session.model, self._session.device
        replica = model.state_dict()
        if self._optimizer.in_sync and self._session.communicator.rank:
            same = {p.data_ptr() for p in model.parameters()}
            replica = {name: value for name, value in replica.items() if value.data_ptr() not in same}
        shared = {} if self._session.communicator.rank else self._optimizer.shared_state()
        return {
            "model": replica,
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "random": torch.get_rng_state(),
            "device_random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "ledger": self.totals.state_dict(),  # under the name that checkpoints have borne from the beginning
            "window": self.meter.state_dict(),
            "next_line": self.next_line,
            "loader_stats": self.loader.stats(),
            **({"shared": shared} if shared else {}),
        }

    def of_all_ranks(self) -> dict[str, Any]:
        """Returns the numbers that are the same on all ranks, for the manifest."""
        return {
            "num_workers": self._session.communicator.size,
            "in_sync": self._optimizer.in_sync,
            "progress": self._optimizer.progress,
            "progress_of_an_epoch": self._session.length.epoch,
            "position": asdict(self.position),
            "loader": self.loader.state_dict(),
            "settings": flatten(self._session.config),
            "fingerprints": self._session.fingerprints,
            "versions": versions(),
            **({"shared": True} if self._optimizer.shared_state() else {}),
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
        self.position = Position(**manifest["position"])
        if self.position.evaluation is not None:
            self.position.evaluation = Evaluation(**manifest["position"]["evaluation"])
        state = resumed.averaged if resumed.state is None else resumed.state
        assert state is not None
        self._optimizer.load_shared_state(state.get("shared", {}))
        if resumed.state is not None:
            self._restore_rank(state)
        else:
            self._restore_average(state, manifest)
        self._scaler.load_state_dict(state["scaler"])
        self.totals.load_state_dict(state["ledger"])

    def _restore_rank(self, state: Mapping[str, Any]) -> None:
        """Restores this rank's own state, for a run with as many ranks as before."""
        self._session.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if self._session.device.type == "cuda" and state["device_random"] is not None:
            torch.cuda.set_rng_state(state["device_random"], self._session.device)
        self.meter.load_state_dict(state["window"])
        self.next_line = state["next_line"]
        self.loader.count_from(state["loader_stats"])

    def _restore_average(self, state: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Restores the average of all replicas, for a run with another number of ranks, whose progress has another unit."""
        scale = self._session.length.epoch / manifest["progress_of_an_epoch"]
        self._session.model.load_state_dict(state["model"])
        self._optimizer.load_averaged_state_dict(state["optimizer"], manifest["progress"] * scale)
        self.position.next_evaluation *= scale
        self.position.evaluated_at *= scale
        torch.manual_seed((torch.initial_seed() + self.position.steps * 0x9E3779B97F4A7C15) % 2**63)
