"""What a callback is, and what it sees of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from hvdlocal.averaging import LocalOptimizer, SynchronousOptimizer
from hvdlocal.training.run_state import RunState
from hvdlocal.training.session import Session

Record = Mapping[str, Any]
"""A record as docs/records.md describes it, with its `kind` and `step`."""

EVENT_OF_KIND = {"steps": "on_log", "round": "on_round", "evaluation": "on_evaluation"}
"""The events that are about a record, by its kind."""

Outcome = Literal["finished", "interrupted", "diverged", "failed"]


class RunView:
    """What a callback sees of its run, on one rank. Nothing of it may be changed.

    Args:
        session: data, model and settings.
        optimizer, state: what training changes.
        directory: the output directory.
        run_id: distinguishes the run from all others.
        resumed_step: the step of the checkpoint from which the run continues.

    Attributes:
        rank, num_workers: this rank, and the number of all ranks; with `survive`, of those that are left.
        device: of the model on this rank.
        model: this rank's replica. It is the average of all replicas in `on_evaluation` and at the end of a run; without overlap
            in `on_round`, too.
        config: the configuration with all defaults, as config.yaml has it; a copy.
        directory: the output directory, in which a callback may make files of its own.
        run_id: 16 hexadecimal digits, which stay the same when the run continues after an interruption.
        resumed_step: the step from which the run continues; None for one that begins. With `survive`, on a rank that takes the
            place of rank 0: that of the newest checkpoint, or 0.
    """

    def __init__(
        self,
        session: Session,
        optimizer: LocalOptimizer | SynchronousOptimizer,
        state: RunState,
        directory: Path,
        run_id: str,
        resumed_step: int | None,
    ) -> None:
        self._optimizer = optimizer
        self._state = state
        self._session = session
        self.device: torch.device = session.device
        self.model: nn.Module = session.model
        self.config: dict[str, Any] = asdict(session.config)
        self.directory = directory
        self.run_id = run_id
        self.resumed_step = resumed_step

    @property
    def rank(self) -> int:
        """This rank."""
        return self._session.communicator.rank

    @property
    def num_workers(self) -> int:
        """The number of all ranks."""
        return self._session.communicator.size

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._state.position.steps

    @property
    def epoch(self) -> float:
        """Scale-invariant epochs done."""
        return float(self._optimizer.progress / self._session.length.epoch)


class Callback:
    """Base class of callbacks: a subclass overrides the events that it needs.

    The name of the class goes into `callbacks` of a configuration, as "package.module:Class", or an object of it into
    `hvdlocal.Trainer`. The events run between two steps, without gradients. What they draw from torch's random numbers does not
    change the run, and neither does a module that they leave in evaluation mode. An event that raises an error, or that changes
    the model, ends the run with a checkpoint, on all ranks; docs/callbacks.md has what is compared.

    Attributes:
        all_ranks: whether every rank has the callback; otherwise rank 0 alone makes one, and another rank does when that has died
            and it takes its place (`survive`).
    """

    all_ranks: ClassVar[bool] = False

    def on_start(self, run: RunView) -> None:
        """Is called before the first step, also of a run that continues, or when this rank takes the place of rank 0."""

    def on_take_over(self, run: RunView, records: Sequence[Record]) -> None:
        """Is called after `on_start` when this rank takes the place of a rank 0 that died (`survive`).

        `load_state_dict` and `on_start` have made of the callback what the newest checkpoint has of it. The events since then
        are not repeated: the model is no longer the one that they were about.

        Args:
            run: the run.
            records: all records since that checkpoint, or since the beginning of the run.
        """

    def on_step(self, run: RunView) -> None:
        """Is called after every optimizer step; it costs nothing where no callback overrides it."""

    def on_log(self, run: RunView, record: Record) -> None:
        """Is called every `log_every_seconds` and at the end, with a record of kind `steps`.

        Args:
            run: the run.
            record: the means since the record before, on this rank.
        """

    def on_round(self, run: RunView, record: Record) -> None:
        """Is called after each averaging of a local method, with a record of kind `round`.

        Args:
            run: the run.
            record: the state after the round; its loss is the mean over all ranks.
        """

    def on_evaluation(self, run: RunView, record: Record) -> None:
        """Is called after each evaluation, with a record of kind `evaluation`.

        Args:
            run: the run.
            record: the metrics of the task over all ranks.
        """

    def on_checkpoint(self, run: RunView, path: Path) -> None:
        """Is called when all ranks have written their part of a checkpoint, which may be some steps after its own step.

        Args:
            run: the run.
            path: directory of the checkpoint, which rank 0 completes in the background: it appears within moments.
        """

    def on_end(self, run: RunView, outcome: Outcome, summary: Record | None) -> None:
        """Is called once, when the run or this part of it ends.

        Args:
            run: the run.
            outcome: "finished", "interrupted" (by a signal, the time limit or a callback, with a checkpoint), "diverged", or
                "failed", when this rank cannot go on. A rank that is killed calls nothing.
            summary: the contents of summary.json on rank 0 of a finished run, otherwise None.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns what a run that continues needs of this callback: a small dict that JSON can hold.

        Rank 0's goes into each checkpoint. It is also called once after `on_start`, so that a mistake shows before training.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict` of rank 0, before `on_start`; on every rank that has the callback.

        Args:
            state: as JSON has read it: tuples are lists, and keys are text.
        """
