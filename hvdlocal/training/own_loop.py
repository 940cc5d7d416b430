"""Checkpoints for a training loop of the user's own, by the machinery of the trainer."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hvdlocal.averaging import ReplicaOptimizer
from hvdlocal.averaging.setup import hyperparameters, layout_digest
from hvdlocal.communicator import CommunicationError, require_agreement, succeed_together
from hvdlocal.communicator.agreement import text_of
from hvdlocal.directory import Directory
from hvdlocal.terminal import say, warn
from hvdlocal.training import interruption
from hvdlocal.training.accounting import RunTotals
from hvdlocal.training.checkpoint.coordinator import CheckpointCoordinator
from hvdlocal.training.checkpoint.replica_state import ReplicaState
from hvdlocal.training.checkpoint.resume import Resumed, same_layout
from hvdlocal.training.config import CheckpointConfig
from hvdlocal.training.config_checks import check_checkpoints
from hvdlocal.training.environment import describe_run, versions
from hvdlocal.training.output_directory import AlreadyFinished, OutputDirectory
from hvdlocal.training.run_files import CHECKPOINTS, ENVIRONMENT, RunStatus, read_environment
from hvdlocal.training.survivors import all_needed
from hvdlocal.training.user_state import Restorable, UserState

FINISHED = "finished.json"

_SPEED_ONLY = ("foreach", "fused", "capturable", "bucket_bytes")
"""Settings that may change when a run is continued."""


class Restored(NamedTuple):
    """A checkpoint from which a loop continues.

    Attributes:
        steps: optimizer steps done.
        ranks: ranks that wrote it.
        averaged: whether the model is the average of their replicas, because their number or their islands have changed.
    """

    steps: int
    ranks: int
    averaged: bool


class Checkpoints:
    """Checkpoints for your own training loop: interrupted anywhere, the same command continues it.

        checkpoints = hvdlocal.Checkpoints("runs/mine", optimizer=optimizer, loader=loader, state={"scheduler": scheduler})
        checkpoints.resume()                     # None at a first start
        while loader.epoch < 10:
            for x, y in loader:
                …
                optimizer.step()
                scheduler.step()
                checkpoints.after_step()         # at a request to stop: a checkpoint, and exit code 85
        checkpoints.finish()

    With the same number of ranks, in the same islands, the continued run is bit for bit the uninterrupted one, also from the
    middle of a round; with others it continues from the average of the replicas. What is restored: the model, the optimizer,
    the states of `loader` and `state`, and the random state of torch (CPU and the model's GPU), NumPy and Python's `random`.
    Everything else that the loop changes belongs into `state`.

    From here to `finish` or `close`, the signals USR2, USR1, TERM and INT are requests to stop, as the end of a Slurm job is. As
    a context manager, it is closed at the end of the block; only `finish` marks the run as finished.

    Args:
        directory: directory of the run, on a file system that all ranks share; it gets `checkpoints/` and a few small files.
        optimizer: the `LocalOptimizer` or `SynchronousOptimizer`.
        model: the optimizer's model, compiled or not; may be left out.
        loader: an object whose `state_dict` is the position in the data, such as a `hvdlocal.Loader` or torchdata's
            StatefulDataLoader. Without one, the loop restores the position itself, from `state` or from `steps`.
        state: more to restore, by name: objects with `state_dict` and `load_state_dict`, such as schedulers and a GradScaler, or
            dicts of numbers, strings and tensors, which are restored in place.
        every_steps: optimizer steps between two checkpoints.
        every_minutes: minutes between two checkpoints. With neither, Young's √(2 · cost of a checkpoint · time between failures),
            from the measured cost.
        failure_hours: mean time between failures of the whole job, for Young's rule.
        keep: checkpoints to keep.
        time_limit_minutes: minutes after the start of the process at which it stops with a checkpoint and exit code 85.

    Attributes:
        directory: of the run.

    Raises:
        ValueError: an argument cannot be used.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        optimizer: ReplicaOptimizer,
        model: torch.nn.Module | None = None,
        loader: Restorable | None = None,
        state: Mapping[str, Any] | None = None,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        failure_hours: float = 24.0,
        keep: int = 2,
        time_limit_minutes: float | None = None,
    ) -> None:
        if not isinstance(optimizer, ReplicaOptimizer):
            raise ValueError(
                f"optimizer is a {type(optimizer).__name__}: give the hvdlocal.LocalOptimizer or hvdlocal.SynchronousOptimizer "
                "around it"
            )
        if model is not None and getattr(model, "_orig_mod", model) is not optimizer.model:
            raise ValueError(
                f"model is a {type(model).__name__} and not the one that the optimizer trains: give that one, or leave model out "
                "and put this one into state={…}"
            )
        if loader is not None and "loader" in (state or {}):
            raise ValueError("state has the name 'loader', which is that of the loader: choose another name")
        if not str(directory):
            raise ValueError("directory='': name a directory")
        self.directory = Path(directory)
        self._optimizer = optimizer
        self._communicator = optimizer.communicator
        self._user_state = UserState(({} if loader is None else {"loader": loader}) | dict(state or {}))
        self._config = CheckpointConfig(every_steps, every_minutes, failure_hours, keep)
        check_checkpoints(self._config)
        self._deadline = interruption.Deadline(time_limit_minutes)
        self._device = next(optimizer.model.parameters()).device
        self._replica = ReplicaState(optimizer, self._device)
        self._run = {
            "optimizer": f"{type(optimizer).__name__} around {type(optimizer.optimizer).__name__}",
            "model": layout_digest(optimizer.model),
            "state": text_of(sorted(self._user_state.names)),
        }
        settings = {**optimizer.settings, **hyperparameters(optimizer)}
        self._settings = {
            name: text_of(value) for name, value in settings.items() if name.split()[-1] not in _SPEED_ONLY
        }
        self._steps = 0
        self._steps_at_last_call = 0
        self._coordinator: CheckpointCoordinator | None = None
        self._totals = RunTotals(optimizer)
        self._open = ExitStack()
        if threading.current_thread() is threading.main_thread():  # no other thread may
            interruption.install_handlers()
            self._open.callback(interruption.restore_handlers)

    @property
    def steps(self) -> int:
        """Optimizer steps done since the beginning of the run, interruptions included."""
        return self._steps

    # -- what a loop calls -------------------------------------------------------------------------------------------

    def resume(self) -> Restored | None:
        """Opens the directory and continues from its newest usable checkpoint; to be called once, before the first step.

        A collective. The model, the optimizer and all of `state` have been built as at the first start.

        Returns:
            What was restored; None when the run begins.

        Raises:
            SetupError: the directory cannot be used, another run uses it, or it belongs to `hvdlocal train`; on all ranks. So
                too when Slurm has restarted the run three times in a row without a new checkpoint.
            CheckpointError: the checkpoints are those of other settings, or none can be read; on all ranks.
            DisagreementError: the ranks were given different arguments; on all ranks.
            AlreadyFinished: the run is finished; on all ranks. Uncaught, it ends the script with exit code 0.
            Interrupted: in a job that survives, a rank has died; on all others. Uncaught, it ends the script with exit code 85.
        """
        if self._coordinator is not None:
            raise ValueError("resume() was called twice: call it once, before the first step")
        communicator = self._communicator
        try:
            with all_needed(communicator):
                resumed = self._open_run()
        except (AlreadyFinished, interruption.Interrupted) as reason:
            self._end(str(reason))
            raise
        assert self._coordinator is not None
        interruption.remember(self._output.what_is_saved)
        self._losses: int = len(communicator.losses)
        self._optimizer.resume_average()
        self._totals.start()
        self._coordinator.start()
        if resumed is None:
            return None
        if communicator.rank == 0:
            for line in resumed.describe({}):
                say(line)
        return Restored(resumed.step, resumed.contents["num_workers"], averaged=resumed.state is None)

    def after_step(self) -> None:
        """Writes a checkpoint if one is due, and stops if that was asked for; to be called on all ranks after every step.

        Within an accumulation it does nothing.

        Raises:
            Interrupted: on all ranks: one rank was asked to stop, or the time is over, and the checkpoint of this step is on
                disk. Uncaught, it ends the script with exit code 85.
            ValueError: the optimizer has not stepped since the last call, or holds something in `state` that cannot be saved.
            DisagreementError: the ranks stand at different steps; on all ranks.
            OSError: the run must stop, but the checkpoint could not be written; on all ranks. On rank 0 alone: the directory is
                no longer where it was.
            CommunicationError: another rank has ended, or has not called `after_step`.
        """
        if self._coordinator is None:
            raise ValueError("after_step() before resume(): call resume() once, before the first step")
        if self._optimizer.micro_batches:
            return
        if self._steps == self._steps_at_last_call:
            raise ValueError(
                "after_step() was called, and the optimizer given to Checkpoints has not stepped since the last call: call it "
                "once after every optimizer.step()"
            )
        self._steps_at_last_call = self._steps
        try:
            self._go_on()
            self._coordinator.after_step(self._steps)
            self._go_on()
        except interruption.Interrupted as reason:
            self._end(str(reason))
            raise
        except CommunicationError as error:
            raise type(error)(
                f"{error}. If every rank is there: after_step() must be called on all ranks, after every step"
            ) from error

    def finish(self) -> None:
        """Marks the run as finished, so that another start has nothing to do, and closes the directory; a collective.

        Raises:
            SetupError: the mark could not be written; on all ranks.
        """
        if self._coordinator is None:
            raise ValueError("finish() before resume(): call resume() once, before the first step")
        if not self._optimizer.in_sync and self._communicator.rank == 0:
            warn("finish() inside a round: the model is no average. Call optimizer.synchronize() before saving it.")
        self._go_on()
        self._coordinator.finish()
        first = -1
        while first != self._communicator.job_ranks[0]:  # again if the first rank has died, perhaps before it could
            first = self._communicator.job_ranks[0]
            succeed_together(self._communicator, self._mark, "hvdlocal.finish")
        self.close()

    def close(self) -> None:
        """Closes the directory, and gives the signals back their handlers; the run can be continued by another start."""
        self._open.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _go_on(self) -> None:
        """Goes on without ranks that have died since the last call, if the job survives that."""
        assert self._coordinator is not None
        if len(self._communicator.losses) > self._losses:
            self._losses = len(self._communicator.losses)
            if self._communicator.rank == 0:
                self._output.take_over()
            self._coordinator.after_loss()

    def _open_run(self) -> Resumed | None:
        """Opens the directory, and restores the checkpoint that it returns; a collective."""
        communicator = self._communicator
        shared = {"directory": str(self.directory), "checkpoints": self._config, **self._run}
        require_agreement(communicator, shared, "hvdlocal.checkpoints")
        succeed_together(communicator, self._user_state.state_dict, "hvdlocal.state")
        with ExitStack() as held:
            output = OutputDirectory(
                self.directory, communicator, lambda: _find_status(self.directory), "Remove it to run again"
            )
            held.enter_context(closing(output))
            coordinator = CheckpointCoordinator(
                communicator,
                self._config,
                output.directory,
                self._deadline,
                self._totals,
                self._of_rank,
                self._of_all_ranks,
                is_quiet=lambda: self._optimizer.is_quiet,
            )
            held.callback(coordinator.writer.close)
            resumed = output.resume(communicator, coordinator.writer, self._mismatch)
            if resumed is not None:
                succeed_together(communicator, lambda: self._restore(resumed), "hvdlocal.restore")
            self._run_id = output.identify(resumed)
            environment = describe_run(communicator, self._device, torch.get_num_threads())
            environment |= {"run": self._run_id, "loop": self._run}

            def begin() -> None:
                if communicator.rank == 0:
                    output.directory.write_text(ENVIRONMENT, json.dumps(environment, indent=1) + "\n")
                    output.begin_attempt(resumed, coordinator.writer)

            succeed_together(communicator, begin, "hvdlocal.records")
            hook = self._optimizer.register_step_post_hook(self._count)
            held.callback(hook.remove)
            self._open.push(held.pop_all())
        self._output, self._coordinator = output, coordinator
        return resumed

    # -- what is in a checkpoint -------------------------------------------------------------------------------------

    def _of_rank(self) -> dict[str, Any]:
        """Returns this rank's state; a collective, since a checkpoint of different steps would be of no use."""
        optimizer = self._optimizer
        position = {"optimizer steps": self._steps, "rounds": optimizer.round, "in round": optimizer.steps_in_round}
        require_agreement(self._communicator, position, "hvdlocal.position")
        return {
            **self._replica.of_rank(),
            "ledger": self._totals.state_dict(),
            "states": self._user_state.state_dict(),
        }

    def _of_all_ranks(self) -> dict[str, Any]:
        assert self._coordinator is not None
        return {
            **self._replica.of_all_ranks(),
            "micro_batches_per_progress": self._reference_batches,
            "loop": self._run,
            "loop_settings": self._settings,
            "versions": versions(),
            "write_seconds": self._coordinator.writer.write_seconds,
            "run": self._run_id,
        }

    @property
    def _reference_batches(self) -> int:
        """Micro-batches that a unit of progress stands for."""
        optimizer = self._optimizer
        workers = optimizer.num_workers
        return optimizer.scaling.reference_batches(workers, optimizer.accumulate * self._communicator.size // workers)

    def _mismatch(self, manifest: Mapping[str, Any]) -> str | None:
        """Says why a checkpoint cannot be continued by this loop; None if it can."""
        if "loop" not in manifest:
            return "was written by `hvdlocal train`: choose another directory"
        pairs = [(manifest["loop"], self._run)]
        if same_layout(manifest, self._communicator):  # on which rates and budgets may depend
            pairs.append((manifest["loop_settings"], self._settings))
        for before, now in pairs:
            for name in now:
                if before.get(name) != now[name]:
                    what = (
                        f"with another {name}"
                        if name == "model"
                        else f"with {name}: {before.get(name)}, not {now[name]}"
                    )
                    return f"was written {what}. Continue it with its own settings, or choose another directory"
        return None

    def _restore(self, resumed: Resumed) -> None:
        scale = resumed.contents["micro_batches_per_progress"] / self._reference_batches
        self._user_state.load_state_dict(resumed.common["states"], resumed.differing)
        self._replica.restore(resumed, scale)
        self._totals.load_state_dict(resumed.common["ledger"])
        self._steps = self._steps_at_last_call = resumed.step

    # -- the steps and the end ---------------------------------------------------------------------------------------

    def _count(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._steps += not self._optimizer.micro_batches

    def _mark(self) -> None:
        if self._communicator.rank == 0:
            self._output.take_over()
            totals = {"steps": self._steps, "rounds": self._optimizer.round, "progress": self._optimizer.progress}
            self._output.directory.write_text(FINISHED, json.dumps(totals | self._totals.state_dict(), indent=1) + "\n")
            self._output.directory.check()

    def _end(self, text: str) -> None:
        self.close()
        interruption.announce_end(self._communicator, text)


def _find_status(path: Path) -> RunStatus:
    """Returns what an earlier attempt left.

    Raises:
        ValueError: there is a run of the trainer.
    """
    with Directory(path) as directory:
        if not directory.exists(ENVIRONMENT):
            return RunStatus.STARTED if directory.exists(CHECKPOINTS) else RunStatus.NEW
        if "loop" not in read_environment(directory):
            raise ValueError(f"{path} holds a run of `hvdlocal train`: choose another directory")
        return RunStatus.FINISHED if directory.exists(FINISHED) else RunStatus.STARTED
