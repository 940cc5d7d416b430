"""A training run: from a configuration to a trained, averaged model, however often it is interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvdlocal.averaging import NonFiniteError
from hvdlocal.communicator import CommunicationError, Communicator, TooFewRanksError, succeed_together
from hvdlocal.communicator.agreement import by_first_rank
from hvdlocal.data.errors import DamagedDataError
from hvdlocal.directory import MovedError
from hvdlocal.import_path import code_digests
from hvdlocal.training import interruption
from hvdlocal.training.builders import code_paths
from hvdlocal.training.callbacks.base import Callback, Outcome, RunView
from hvdlocal.training.callbacks.build import build_callbacks, makers
from hvdlocal.training.callbacks.events import Events
from hvdlocal.training.checkpoint.coordinator import CheckpointCoordinator
from hvdlocal.training.checkpoint.files import directory as checkpoint_directory
from hvdlocal.training.checkpoint.files import newest_manifest
from hvdlocal.training.checkpoint.resume import Resumed
from hvdlocal.training.config import TrainConfig
from hvdlocal.training.config_checks import effective_settings, unused_settings
from hvdlocal.training.console import Console
from hvdlocal.training.damage import damage_elsewhere, damage_found
from hvdlocal.training.environment import describe_run
from hvdlocal.training.errors import DivergedError, LostRankError
from hvdlocal.training.evaluation import Evaluation, Evaluator, described
from hvdlocal.training.given import with_names
from hvdlocal.training.joining import require_as_configured
from hvdlocal.training.memory import out_of_memory
from hvdlocal.training.metrics import Forwarded, JsonLines, Metrics, NoMetrics, records_after, strict
from hvdlocal.training.optimizers import build_optimizer, is_local
from hvdlocal.training.output_directory import OutputDirectory
from hvdlocal.training.recorder import Recorder, Summary
from hvdlocal.training.run_facts import run_facts
from hvdlocal.training.run_files import CHECKPOINTS, SUMMARY, RunStatus, clear, describe, find_status
from hvdlocal.training.run_state import RunState
from hvdlocal.training.saved_model import BestModel, LastGood, copy_of, save_state
from hvdlocal.training.session import Session, check_settings
from hvdlocal.training.standby import Standby
from hvdlocal.training.step import TrainingStep
from hvdlocal.training.survivors import Survivors, all_needed
from hvdlocal.training.tasks import Batch, Task


class Trainer:
    """One rank's part of a run. Building it and `run` are collectives.

    An interrupted run continues from its newest checkpoint. With the same number of ranks, in the same islands, it is bit
    for bit identical to an uninterrupted run.

    Args:
        config: what to do.
        communicator: the ranks.
        task: what is learned, in place of the setting `task`.
        model: the network to train, in place of the section `model`.
        callbacks: are called at the events of the run, beside those of the configuration; on all ranks, or on rank 0 if their
            class says so.

    Attributes:
        session: data, model and settings.
        output: the directory of the run.
        optimizer, step: train the session's model.
        state: what training changes.
        coordinator: writes the checkpoints.
        survivors: takes ranks that die out of the run.
        facts: what the run is.
        events: calls the callbacks.
        resumed: the checkpoint from which this run continues, if any.

    Raises:
        SetupError, DisagreementError: the run cannot start; the same on every rank.
        AlreadyFinished: there is nothing to do.
    """

    def __init__(
        self,
        config: TrainConfig,
        communicator: Communicator,
        *,
        task: Task | None = None,
        model: nn.Module | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config = with_names(config, task, model)
        self.communicator = communicator
        deadline = interruption.Deadline(config.time_limit_minutes)
        with all_needed(communicator), ExitStack() as held:
            # Before the directory is made, and before data are read, which may take minutes.
            succeed_together(communicator, lambda: check_settings(config, communicator), "hvdlocal.check")
            require_as_configured(config, communicator)
            called = build_callbacks(config, communicator, callbacks)
            self._makers = makers(config, callbacks)
            self.output = held.enter_context(closing(self._open_directory()))
            self.session = session = held.enter_context(closing(Session(config, communicator, task=task, model=model)))
            self.unused = unused_settings(config)
            self.optimizer = build_optimizer(config, session.model, session.length, communicator)
            self.step = TrainingStep(session, self.optimizer)
            self.evaluator = Evaluator(session, self.optimizer, self.step.forward)
            self.state = RunState(session, self.optimizer, self.step)
            # Dropout and the like differ between ranks from here on; the initial weights do not.
            torch.manual_seed((config.seed * communicator.size + communicator.rank + 1) % 2**63)
            directory = self.output.directory
            self.best_model = BestModel(directory, "best.pt")
            self._standby: Standby | None = None
            self.last_good = self._last_good() if communicator.rank == 0 else None
            self.coordinator = CheckpointCoordinator(
                communicator,
                config.checkpoint,
                directory,
                deadline,
                self.state.totals,
                self.state.of_rank,
                self._manifest_contents,
                lambda step: self.events.checkpoint(checkpoint_directory(self.output.path / CHECKPOINTS, step)),
                lambda: self.optimizer.is_quiet,
            )
            # Before the directory is closed: the thread may still be writing there.
            held.callback(self.coordinator.writer.close)
            self.resumed = self._resume()
            self.run_id = self.output.identify(self.resumed)
            self.events = Events(called, self._view(), communicator)
            environment = self._describe()
            self.facts = run_facts(session, environment, config.output)
            self.metrics = succeed_together(communicator, lambda: self._open_metrics(environment), "hvdlocal.records")
            interruption.remember(self.output.what_is_saved)
            self.recorder = Recorder(self.metrics, self.optimizer, self.state, session)
            self.survivors = Survivors(communicator, config.min_workers, self.optimizer, self.state)
            self._held = held.pop_all()

    def _last_good(self) -> LastGood:
        return LastGood(self.session.model, self.optimizer.buffer_policies)

    # -- before the first step ---------------------------------------------------------------------------------------

    def _open_directory(self) -> OutputDirectory:
        config, path = self.config, Path(self.config.output)
        return OutputDirectory(
            path,
            self.communicator,
            lambda: find_status(path, effective_settings(config), config.overwrite),
            "--overwrite true runs it again",
        )

    def _resume(self) -> Resumed | None:
        """Restores the newest usable checkpoint, if there is one; a collective."""
        resumed = self.output.resume(self.communicator, self.coordinator.writer, self.state.mismatch)
        if resumed is not None:
            succeed_together(self.communicator, lambda: self.state.restore(resumed), "hvdlocal.restore")
        return resumed

    def _describe(self) -> dict[str, Any]:
        """Returns the contents of environment.json; a collective."""
        session = self.session
        environment = describe_run(self.communicator, session.device, session.threads) | {
            "run": self.run_id,
            "task": session.task.describe(self.config.task),
            "training_data": session.train_data.describe(),
            "preprocessing": session.preprocessing.description or "none",
            "settings_without_effect": self.unused,
        }
        if session.train_data.kind == "jpeg":
            from hvdlocal.data.kinds.decode import decoder_description  # loads OpenCV

            environment["decoder"] = decoder_description()
        return environment

    def _view(self) -> RunView:
        step = None if self.resumed is None else self.resumed.step
        return RunView(self.session, self.optimizer, self.state, self.output.path, self.run_id, step)

    def _open_metrics(self, environment: dict[str, Any]) -> Metrics:
        """Makes the output directory ready and opens metrics.jsonl where the run continues; on rank 0.

        On other ranks the records are kept for the case that rank 0 dies, if the job goes on then.
        """
        writer, resumed, directory = self.coordinator.writer, self.resumed, self.output.directory
        kept = 0 if resumed is None else resumed.contents["metrics_bytes"]
        if self.communicator.rank != 0:
            if self.communicator.survives:
                self._standby = Standby(directory, kept, lambda: writer.takes_room)
            return Forwarded(self._standby or NoMetrics(), self.events.record)
        if resumed is None and self.output.status is RunStatus.NEW:
            clear(directory)
        describe(directory, asdict(self.config), environment)
        self.output.begin_attempt(resumed, writer)
        return Forwarded(JsonLines(directory, kept, lambda: writer.takes_room), self.events.record)

    def _manifest_contents(self) -> dict[str, Any]:
        """Returns what a checkpoint holds beside the states of the ranks; called on rank 0."""
        return {
            **self.state.of_all_ranks(),
            "metrics_bytes": self.metrics.position(),
            "write_seconds": self.coordinator.writer.write_seconds,
            "run": self.run_id,
            **({"callbacks": states} if (states := self.events.state()) else {}),
        }

    # -- training ----------------------------------------------------------------------------------------------------

    def run(self) -> Summary:
        """Trains until the budget is used up, evaluates, and saves the averaged model.

        Raises:
            Interrupted: on all ranks, with a checkpoint saved; also where fewer than `min_workers` are left.
            TooFewRanksError: the ranks could not agree in time on who is left; the last checkpoint is an earlier one.
            DivergedError: a loss became NaN or infinite; on all ranks, with a model saved.
            CommunicationError: another rank ended, and the job does not survive that.
            DamageError: damaged images were found; on all ranks.
            CallbackError: a callback failed; on all ranks, with a checkpoint saved.
            LostRankError: this rank cannot go on: no room for its records, no memory, or an image that cannot be read.
        """
        directory, start = self.output.directory, self.optimizer.progress / self.session.length.epoch
        self.console = Console(self.communicator, self.config.epochs, start)
        outcome: Outcome = "failed"
        try:
            summary = self._train()
            self.metrics.close()
            self.events.end("finished", summary.record() if self.communicator.rank == 0 else None)
            self.events.check(self.output.what_is_saved())
            return summary
        except interruption.Interrupted:
            self.events.end("interrupted")
            self.events.check(self.output.what_is_saved())
            raise
        except NonFiniteError as error:
            outcome = "diverged"
            raise DivergedError(f"{error} {self._save_last_good()}") from error
        except DamagedDataError as error:
            raise damage_found(directory, self.communicator, error, self.state.position.steps) from error
        except TooFewRanksError as error:
            raise TooFewRanksError(f"{error} Once that is mended: {self.output.what_is_saved()}.") from error
        except CommunicationError as error:
            if (damage := damage_elsewhere(directory)) is None:
                raise
            raise damage from error
        except (OSError, ValueError, MemoryError, RuntimeError) as error:
            shortage = out_of_memory(error)
            if isinstance(error, RuntimeError) and shortage is None:
                raise
            raise LostRankError(
                f"{self.communicator.describe()} cannot go on after step {self.state.position.steps}: "
                f"{self._remedy(shortage or str(error) or type(error).__name__)}"
            ) from error
        finally:
            self.events.end(outcome)
            self.console.close()
            with suppress(OSError):  # reported above
                self.metrics.close()
            self._held.close()

    def _train(self) -> Summary:
        optimizer, position = self.optimizer, self.state.position
        if self.last_good is not None and optimizer.in_sync:
            self.last_good.offer()
        self.events.start({} if self.resumed is None else self.resumed.contents.get("callbacks", {}))
        optimizer.resume_average()
        self.state.totals.start()
        self.coordinator.start()
        self._introduce()
        self.recorder.begin()
        self.session.model.train()
        self._go_on()
        with closing(self.state.batches()) as batches:
            while not optimizer.finished:
                self._micro_batch(batches)
                if optimizer.micro_batches:
                    continue
                position.steps += 1
                self._go_on()
                if self.events.has_steps:
                    self.events.step()
                due = self.state.totals.elapsed >= self.state.next_line
                if due:
                    self.state.next_line = self.state.totals.elapsed + self.config.log_every_seconds
                    self.recorder.training(position.steps)
                self.console.progress(self.recorder.status, due)
                if not optimizer.round_under_way:
                    self._after_round()
                if not optimizer.finished:
                    self._checkpoint()
        return self._end()

    def _checkpoint(self) -> None:
        """Begins or completes a checkpoint, or ends the run with one, if that is due; a collective."""
        coordinator, steps = self.coordinator, self.state.position.steps
        coordinator.stop_reason = self.events.failure
        coordinator.after_step(steps)
        self._go_on()
        while (reason := self.survivors.too_few) is not None:
            coordinator.stop(steps, reason)  # which returns only if more ranks are lost meanwhile
            self._go_on()

    def _go_on(self, *, ends: bool = False) -> None:
        """Goes on without the ranks that were lost in the collectives since the last call.

        Args:
            ends: whether there will be no checkpoint any more.
        """
        lost, steps = self.survivors.take_in(), self.state.position.steps
        if not lost:
            return
        if (damage := damage_elsewhere(self.output.directory)) is not None:  # which the others would come to as well
            raise damage
        self._take_over()
        if not ends:
            self.coordinator.after_loss()
            if self.communicator.rank == 0:
                self.coordinator.writer.submit(self.best_model.write)  # which rank 0 may not have done before it died
        self.recorder.begin()
        for one in lost:
            self.recorder.lost(one, steps)
            self.console.say(f"{self.recorder.status().position}  {one}")

    def _take_over(self) -> None:
        """Takes on the duties of rank 0, if this rank has become it; what it has taken on already stays as it is."""
        if self.communicator.rank != 0:
            return
        self.output.take_over()
        if self._standby is not None:
            self._standby.take_over()
        if self.last_good is None:  # else this rank has been the first one before
            self.last_good = self._last_good()
            found = newest_manifest(self.output.path / CHECKPOINTS) or {}
            records = records_after(self.output.directory, found.get("metrics_bytes", 0))
            self.events.take_over(self._makers, found.get("callbacks", {}), found.get("step", 0), records)
        self.console.open(self.optimizer.progress / self.session.length.epoch)

    def _micro_batch(self, batches: Iterator[Batch]) -> None:
        start = time.perf_counter()
        batch = next(batches)
        self.state.totals.waiting_for_data += time.perf_counter() - start
        loss, output = self.step.compute(batch)
        self.state.meter.add(loss, self.session.task.metrics(output, batch))
        self.step.update()

    def _after_round(self) -> None:
        """Records a round, evaluates if that is due, and keeps the model if it is the average: not one that is under way."""
        optimizer, position = self.optimizer, self.state.position
        if is_local(optimizer):
            self.recorder.round(position.steps)
        if optimizer.progress >= position.next_evaluation and not optimizer.finished:
            gap = self.config.evaluate_every_epochs * self.session.length.epoch
            position.next_evaluation = (optimizer.progress // gap + 1) * gap
            self._evaluate()
        if self.last_good is not None and optimizer.in_sync:
            self.last_good.offer()

    def _evaluate(self) -> Evaluation:
        """Evaluates the average and keeps it if it is the best; a collective."""
        self.optimizer.finish_average()  # which belongs to training
        start = time.perf_counter()
        with self.state.totals.beside_training():
            evaluation = self.evaluator()
        self._go_on()
        self.state.totals.evaluating += time.perf_counter() - start
        position, progress = self.state.position, self.optimizer.progress
        position.evaluation, position.evaluated_at = evaluation, progress
        self.recorder.evaluation(evaluation, position.steps)
        name, direction = self.session.task.best
        if position.is_better(value := evaluation.metrics.get(name), direction):
            position.best = value
            if self.communicator.rank == 0 or self.communicator.survives:
                self.best_model.take(copy_of(self.session.model))
            if self.communicator.rank == 0:
                self.coordinator.writer.submit(self.best_model.write)
        self.console.say(f"{self.recorder.status().position}  test {described(evaluation, self.session.task)}")
        return evaluation

    def _end(self) -> Summary:
        """Evaluates if need be, and writes what remains of the run."""
        position, directory = self.state.position, self.output.directory
        if self.state.meter.micro_batches:
            self.recorder.training(position.steps)
            self.console.progress(self.recorder.status, due=True)
        evaluation = position.evaluation
        if evaluation is None or position.evaluated_at != self.optimizer.progress:
            evaluation = self._evaluate()
        self.coordinator.finish()
        self._go_on(ends=True)
        summary, first = self.recorder.summary(self.facts, evaluation), self.communicator.rank == 0
        record = summary.record()
        if not first:  # kept for the case that rank 0 dies
            self.metrics.write("end", position.steps, **record)

        def write() -> None:
            self._take_over()
            self.best_model.write()
            save_state(copy_of(self.session.model), directory, "model.pt")
            if first:
                self.metrics.write("end", position.steps, **record)
            self.metrics.position()
            directory.write_text(SUMMARY, json.dumps(strict(record), indent=1) + "\n")
            directory.check()

        if self.communicator.survives:
            by_first_rank(self.communicator, write, "hvdlocal.results")
        elif first:
            write()
        return summary

    # -- what a person reads -----------------------------------------------------------------------------------------

    def _introduce(self) -> None:
        """Prints what is special about this run."""
        for line in self.facts.header():
            self.console.say(line)
        if self.session.preprocessing.description:
            self.console.say(f"  images     {self.session.preprocessing.description}")
        if self.unused:
            self.console.say(f"note: without effect in this run: {', '.join(self.unused)}")
        if kept := self.optimizer.kept_buffers:
            self.console.say(
                f"note: buffers that are each rank's own (the saved model has rank 0's): {', '.join(kept[:8])}"
                + (f" and {len(kept) - 8} more" if len(kept) > 8 else "")
            )
        if self.resumed is not None:
            for line in self.resumed.describe(code_digests(code_paths(self.config))):
                self.console.say(line)

    def _remedy(self, problem: str) -> str:
        """Says why this rank cannot go on, and what to do."""
        try:
            self.output.directory.check()
        except MovedError as moved:
            return (
                f"{moved}. Move it back and start the same command to continue from the last checkpoint, or start anew."
            )
        try:
            saved = self.output.what_is_saved()
        except OSError:  # the problem may be a file server that does not answer
            saved = "the same command continues from the last checkpoint"
        return f"{problem}. Once that is mended: {saved}."

    def _save_last_good(self) -> str:
        """Saves the last good average on rank 0, and says where it is; a collective."""
        name = "last_good.pt"
        path = self.output.path / name
        told = f"The last good average is in {path}."
        if self.last_good is not None:
            try:
                if not self.last_good.save(self.output.directory, name) and not self.output.directory.exists(name):
                    told = f"The checkpoints in {self.output.path / CHECKPOINTS} are from before."
            except (OSError, RuntimeError) as error:
                told = f"The last good average could not be saved in {path}: {error}"
        return str(self.communicator.gather(told, "hvdlocal.last_good")[0])
