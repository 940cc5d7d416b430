"""A training run: from a configuration to a trained, averaged model, however often it is interrupted."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvdlocal.averaging import NonFiniteError
from hvdlocal.communicator import CommunicationError, Communicator, require_agreement, succeed_together
from hvdlocal.data import Loader, ShardedDataset, evaluation_batches
from hvdlocal.data.errors import DamagedDataError
from hvdlocal.data.load.order import OrderMode
from hvdlocal.directory import Directory, MovedError
from hvdlocal.terminal import warn
from hvdlocal.training import interruption, output_directory
from hvdlocal.training.accounting import RunTotals, TrainingMeter
from hvdlocal.training.builders import check_model, configured_loader, facts, memory_format, model_from_config
from hvdlocal.training.checkpoint.coordinator import CheckpointCoordinator
from hvdlocal.training.checkpoint.files import newest_first
from hvdlocal.training.checkpoint.resume import Resumed, resume
from hvdlocal.training.config import TrainConfig
from hvdlocal.training.config_checks import check_ranges, effective_settings, flatten, unused_settings
from hvdlocal.training.console import Console
from hvdlocal.training.damage import damage_elsewhere, damage_found, forget_damage
from hvdlocal.training.environment import choose_device, describe_run, set_threads, versions
from hvdlocal.training.evaluation import Evaluation, evaluate
from hvdlocal.training.memory import out_of_memory
from hvdlocal.training.metrics import METRICS, JsonLines, Metrics, NoMetrics, TensorBoard
from hvdlocal.training.output_directory import CHECKPOINTS, SUMMARY, TENSORBOARD, RunStatus
from hvdlocal.training.preprocessing import preprocessing_from_config
from hvdlocal.training.presets import build_optimizer, is_local
from hvdlocal.training.recorder import Recorder
from hvdlocal.training.run_length import run_length
from hvdlocal.training.saved_model import BestModel, LastGood, copy_of, save_state

Batch = tuple[torch.Tensor, torch.Tensor]


class DivergedError(ArithmeticError):
    """The run ended in NaN or infinity; the message says which model was saved. Raised on all ranks."""


class AlreadyFinished(Exception):  # noqa: N818  (no error)
    """The output directory holds this run, finished. Raised on all ranks."""


class LostRankError(RuntimeError):
    """This rank cannot go on, and the others do not know."""


@dataclass
class Position:
    """Where a run stands; the same on every rank.

    Attributes:
        steps: optimizer steps done.
        next_evaluation: progress at which the next evaluation is due.
        evaluation, evaluated_at: the last one, and the progress it was made at.
        best: the best accuracy so far.
    """

    next_evaluation: float
    steps: int = 0
    evaluation: Evaluation | None = None
    evaluated_at: float = -1.0
    best: float = -1.0


@dataclass(frozen=True)
class Summary:
    """What a run came to. Counts are those of one rank unless they say otherwise."""

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


class Trainer:
    """One rank's part of a run. Building it and `run` are collectives.

    A run that was interrupted continues from its newest checkpoint: with as many ranks bit for bit as if nothing had happened.

    Args:
        config: what to do.
        communicator: the ranks.

    Raises:
        SetupError, DisagreementError: the run cannot start; the same on every rank.
        AlreadyFinished: there is nothing to do.
    """

    def __init__(self, config: TrainConfig, communicator: Communicator) -> None:
        self.config = config
        self.communicator = communicator
        self.directory = Path(config.output)
        self.held = ExitStack()
        self.run_id: str | None = None
        self.probe = f".probe-{secrets.token_hex(8)}"
        try:
            self._set_up()
        except BaseException:
            self.held.close()
            raise

    def _set_up(self) -> None:
        config, communicator = self.config, self.communicator
        self.deadline = interruption.Deadline(config.time_limit_minutes)
        succeed_together(communicator, self._check, "hvdlocal.check")
        standing = self._look_around()
        data = config.data
        self.train_data = ShardedDataset(
            data.path, data.train_split, storage=data.storage, share=data.share, communicator=communicator
        )
        self.held.callback(self.train_data.close)
        self.test_data = ShardedDataset(data.path, data.test_split, communicator=communicator)
        self.held.callback(self.test_data.close)
        succeed_together(communicator, self._prepare, "hvdlocal.prepare")
        require_agreement(communicator, facts(config, self.device, self._fingerprints()), "hvdlocal.preflight")
        self.threads = set_threads(config.threads, communicator)
        self.unused = unused_settings(config)
        self.optimizer = build_optimizer(config, self.model, self.length, communicator)
        self.forward: nn.Module = torch.compile(self.model) if config.model.compile else self.model  # type: ignore[assignment]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.totals = RunTotals(self.optimizer)
        self.window = TrainingMeter(self.device)
        self.position = Position(next_evaluation=config.evaluate_every_epochs * self.length.epoch)
        self.next_line = config.log_every_seconds
        # Dropout and the like differ between ranks from here on; the weights above do not.
        torch.manual_seed((config.seed * communicator.size + communicator.rank + 1) % 2**63)
        self.coordinator = CheckpointCoordinator(
            communicator, config.checkpoint, self.output, self.deadline, self.totals, self._state, self._contents
        )
        # Before the directory is closed: its thread may still be writing there, and a descriptor soon has another meaning.
        self.held.callback(self.coordinator.writer.close)
        self.resumed: Resumed | None = None
        if standing is RunStatus.STARTED:
            self.resumed = resume(communicator, self.directory / CHECKPOINTS, self._not_ours, self.run_id)
        if (resumed := self.resumed) is not None:
            succeed_together(communicator, lambda: self._restore(resumed), "hvdlocal.restore")
        # A run that was begun by an older hvdlocal has no name of its own yet.
        self.run_id = self.run_id or (resumed and resumed.contents.get("run")) or secrets.token_hex(8)
        environment = describe_run(communicator, self.device, self.threads) | {
            "run": self.run_id,
            "training images": self.train_data.describe(),
            "images": self.images.description or "as they are",
            "settings without effect": self.unused,
        }
        if self.train_data.kind == "jpeg":
            from hvdlocal.data.read.decode import decoder_description  # loads OpenCV

            environment["decoder"] = decoder_description()
        self.metrics: Metrics = NoMetrics()
        succeed_together(communicator, lambda: self._open_records(environment), "hvdlocal.records")
        interruption.remember(self._saved)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        gradient_bytes = 4 * trained if communicator.size > 1 else 0
        self.recorder = Recorder(
            self.metrics, self.optimizer, self.loader, self.totals, self.length.epoch, gradient_bytes
        )

    # -- before the first step ---------------------------------------------------------------------------------------

    def _check(self) -> None:
        """What can be known to be wrong before any data are read."""
        check_ranges(self.config)
        versions()  # read once, where a failure is everybody's
        self.device = choose_device(self.config.device, self.communicator)
        if self.communicator.rank == 0:
            self.output: Directory = self.held.enter_context(output_directory.claim(self.directory))
            self.standing = output_directory.find_status(
                self.directory, effective_settings(self.config), self.config.overwrite
            )
            self.held.callback(self.output.remove, self.probe)
            self.output.write_text(self.probe, "")

    def _look_around(self) -> RunStatus:
        """What rank 0 found in the output directory, once every rank is sure to see the same one; a collective."""
        communicator, rank = self.communicator, self.communicator.rank
        found = (self.probe, self.standing, output_directory.run_id(self.output)) if rank == 0 else None
        probe, standing, run_id = communicator.gather(found, "hvdlocal.standing")[0]
        self.run_id = run_id if standing is RunStatus.STARTED else None

        def see() -> None:
            if rank:
                self.output = self.held.enter_context(Directory(self.directory))
            if not self.output.exists(probe):
                raise ValueError(
                    f"output={self.directory} is not the directory that rank 0 sees: it must be on a file system that all "
                    "nodes share"
                )

        succeed_together(communicator, see, "hvdlocal.shared_output")
        if rank == 0:
            self.output.remove(probe)
        if standing is RunStatus.FINISHED:
            raise AlreadyFinished(
                f"{self.directory} holds this run, finished: nothing to do. --overwrite true runs it again."
            )
        return standing

    def _prepare(self) -> None:
        """Everything else that can fail for a user's mistake and needs no other rank."""
        config, communicator = self.config, self.communicator
        if self.train_data.shape != self.test_data.shape or self.train_data.classes != self.test_data.classes:
            raise ValueError(f"{config.data.path}: the training and the test images differ in shape or classes")
        self.images = preprocessing_from_config(config.data, self.train_data, self.test_data)
        self.loader = self._loader()
        self.length = run_length(config, self.loader.steps_per_epoch, communicator.size)
        check_model(config, self.train_data, self.images, communicator.size)
        self.model = model_from_config(config, self.train_data.num_classes, self.images, self.device)
        self.memory_format = memory_format(config.model)

    def _loader(self, *, seed: int | None = None, order: OrderMode | None = None) -> Loader:
        rank, size = self.communicator.rank, self.communicator.size
        return configured_loader(
            self.config,
            self.train_data,
            self.images,
            self.device,
            rank=rank,
            num_workers=size,
            seed=seed,
            order=order,
        )

    def _fingerprints(self) -> dict[str, str]:
        return {"training": self.train_data.fingerprint, "test": self.test_data.fingerprint}

    def _open_records(self, environment: dict[str, Any]) -> None:
        if self.communicator.rank != 0:
            return
        forget_damage(self.output)
        steps, kept = self.position.steps, 0
        if self.resumed is None and self.standing is RunStatus.NEW:
            output_directory.clear(self.output)
        else:
            kept = self._clear_up()
        output_directory.describe(self.output, asdict(self.config), environment)
        output_directory.note_attempt(self.output, steps, self.communicator.size)
        writer = self.coordinator.writer
        self.metrics = JsonLines(self.output, kept, lambda: writer.takes_room)
        if self.config.tensorboard:
            first = 0 if self.resumed is None else steps + 1
            self.metrics = TensorBoard(self.directory / TENSORBOARD, self.metrics, first)

    def _clear_up(self) -> int:
        """Takes away what the last attempt left unfinished, and what it did after its last good checkpoint.

        Returns:
            Bytes of metrics.jsonl to keep.
        """
        self.coordinator.writer.discard_all_but_good(None if self.resumed is None else self.resumed.step)
        if self.resumed is None:
            return 0
        for problem in self.resumed.skipped:
            warn(f"{problem}: going back to step {self.resumed.step}")
        kept = self.resumed.contents["metrics_bytes"]
        path = self.directory / METRICS
        size = path.stat().st_size if path.exists() else 0
        if size < kept:
            warn(f"{path} has lost {kept - size} bytes that were in it at the checkpoint of step {self.resumed.step}")
        return kept

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        """What this rank needs to go on."""
        model = self.model.state_dict()
        if self.optimizer.in_sync and self.communicator.rank:
            same = {p.data_ptr() for p in self.model.parameters()}
            model = {name: value for name, value in model.items() if value.data_ptr() not in same}
        return {
            "model": model,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "device_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "totals": self.totals.state_dict(),
            "window": self.window.state_dict(),
            "next_line": self.next_line,
            "loader_stats": self.loader.stats(),
        }

    def _contents(self) -> dict[str, Any]:
        """What is the same for all ranks; only rank 0 writes it."""
        return {
            "num_workers": self.communicator.size,
            "in_sync": self.optimizer.in_sync,
            "progress": self.optimizer.progress,
            "progress_of_an_epoch": self.length.epoch,
            "position": asdict(self.position),
            "loader": self.loader.state_dict(),
            "metrics_bytes": self.metrics.position(),
            "write_seconds": self.coordinator.writer.write_seconds,
            "settings": flatten(self.config),
            "fingerprints": self._fingerprints(),
            "versions": versions(),
            "run": self.run_id,
        }

    def _saved(self) -> str:
        """What is on disk, and how the run goes on."""
        if (self.directory / SUMMARY).exists():
            return f"the run in {self.directory} is finished"
        if steps := newest_first(self.directory / CHECKPOINTS):
            return (
                f"the same command continues from the checkpoint of step {steps[0]} in {self.directory / CHECKPOINTS}"
            )
        return f"{self.directory} holds no checkpoint to continue from yet, so the same command begins anew"

    def _not_ours(self, contents: Mapping[str, Any]) -> str | None:
        """Why a checkpoint is not of this run."""
        if difference := output_directory.first_difference(contents["settings"], effective_settings(self.config)):
            return f"was written {difference}"
        for split, fingerprint in self._fingerprints().items():
            if (before := contents["fingerprints"][split]) != fingerprint:
                return f"was written with other {split} data (fingerprint {before[:12]}, now {fingerprint[:12]})"
        return None

    def _restore(self, resumed: Resumed) -> None:
        contents = resumed.contents
        if self.config.data.order == "auto" and contents["loader"]["order"] != self.loader.state_dict()["order"]:
            # This node stores the data in another way than that before, for which another order would be quicker.
            self.loader = self._loader(order=contents["loader"]["order"])
        self.loader.load_state_dict(contents["loader"])
        self.coordinator.writer.write_seconds = contents["write_seconds"]
        position = Position(**contents["position"])
        if position.evaluation is not None:
            position.evaluation = Evaluation(**position.evaluation)  # type: ignore[arg-type]
        self.position = position
        if resumed.state is not None:
            state = resumed.state
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
            if self.device.type == "cuda" and state["device_random"] is not None:
                torch.cuda.set_rng_state(state["device_random"], self.device)
            self.window.load_state_dict(state["window"])
            self.next_line = state["next_line"]
            self.loader.count_from(state["loader_stats"])
        else:
            assert resumed.averaged is not None
            state = resumed.averaged
            scale = self.length.epoch / contents["progress_of_an_epoch"]
            self.model.load_state_dict(state["model"])
            self.optimizer.load_averaged_state_dict(state["optimizer"], contents["progress"] * scale)
            position.next_evaluation *= scale
            position.evaluated_at *= scale
            torch.manual_seed((torch.initial_seed() + position.steps * 0x9E3779B97F4A7C15) % 2**63)
        self.scaler.load_state_dict(state["scaler"])
        self.totals.load_state_dict(state["totals"])

    # -- training ----------------------------------------------------------------------------------------------------

    def run(self) -> Summary:
        """Trains until the budget is used up, evaluates, and saves the averaged model.

        Raises:
            Interrupted: on all ranks, with a checkpoint saved.
            DivergedError: a loss became NaN or infinite; on all ranks, with a model saved.
            CommunicationError: another rank ended.
            DamageError: damaged images were found; on all ranks.
            LostRankError: this rank cannot go on: no room for its records, no memory, or an image that cannot be read.
        """
        console = Console(self.communicator, self.length.budget, self.length.epoch, self.optimizer.progress)
        try:
            summary = self._train(console)
            self.metrics.close()
            return summary
        except NonFiniteError as error:
            raise DivergedError(f"{error} {self._save_last_good()}") from error
        except DamagedDataError as error:
            raise damage_found(self.output, self.communicator, error, self.position.steps) from error
        except CommunicationError as error:
            if (damage := damage_elsewhere(self.output)) is None:
                raise
            raise damage from error
        except (OSError, ValueError, MemoryError, RuntimeError) as error:
            shortage = out_of_memory(error)
            if isinstance(error, RuntimeError) and shortage is None:
                raise
            raise LostRankError(
                f"{self.communicator.describe()} cannot go on after step {self.position.steps}: "
                f"{self._reason(shortage or str(error) or type(error).__name__)}"
            ) from error
        finally:
            console.close()
            with suppress(OSError):  # said above
                self.metrics.close()
            self.held.close()

    def _reason(self, what: str) -> str:
        """Why this rank cannot go on, and what to do."""
        try:
            self.output.check()
        except MovedError as moved:
            return (
                f"{moved}. Move it back and start the same command to continue from the last checkpoint, or start anew."
            )
        try:
            saved = self._saved()
        except OSError:  # a file server that does not answer may be what this is about
            saved = "the same command continues from the last checkpoint"
        return f"{what}. Once that is mended: {saved}."

    def _train(self, console: Console) -> Summary:
        config, optimizer, position = self.config, self.optimizer, self.position
        self.best_model = BestModel(self.output, "best.pt")
        self.last_good = LastGood(self.model, optimizer.buffer_policies) if self.communicator.rank == 0 else None
        if self.last_good is not None and optimizer.in_sync:
            self.last_good.offer()
        self.totals.start()
        self.coordinator.start()

        console.say(f"training images: {self.train_data.describe()}")
        if self.images.description:
            console.say(f"images: {self.images.description}")
        if self.unused:
            console.say(f"note: without effect in this run: {', '.join(self.unused)}")
        if kept := optimizer.kept_buffers:
            console.say(
                f"note: buffers that are each rank's own (the saved model has rank 0's): {', '.join(kept[:8])}"
                + (f" and {len(kept) - 8} more" if len(kept) > 8 else "")
            )
        if self.resumed is not None:
            self._say_resumed(console, self.resumed)
        self.model.train()
        with closing(self.loader.endless()) as batches:
            while not optimizer.finished:
                self._micro_batch(batches)
                if optimizer.micro_batches:
                    continue
                position.steps += 1
                due = self.totals.elapsed >= self.next_line
                if due:
                    self.next_line = self.totals.elapsed + config.log_every_seconds
                    self.recorder.window(self.window, position.steps)
                console.progress(optimizer.progress, self.recorder.status(), due)
                if optimizer.in_sync:
                    self._after_round(console)
                if not optimizer.finished:
                    self.coordinator.after_step(position.steps)
        return self._end(console)

    def _end(self, console: Console) -> Summary:
        position = self.position
        if self.window.micro_batches:
            self.recorder.window(self.window, position.steps)
        if position.evaluation is None or position.evaluated_at != self.optimizer.progress:
            self._evaluate(console)
        assert position.evaluation is not None
        summary = self._summary(position.evaluation)
        self.coordinator.finish()
        if self.communicator.rank == 0:
            self.best_model.write()
            save_state(copy_of(self.model), self.output, "model.pt")
            record = {**asdict(summary), "communication_saved": summary.communication_saved}
            self.metrics.write("end", position.steps, **record)
            self.metrics.position()
            self.output.write_text(SUMMARY, json.dumps(record, indent=1) + "\n")
            self.output.check()
        return summary

    def _after_round(self, console: Console) -> None:
        optimizer, position = self.optimizer, self.position
        if self.last_good is not None:
            self.last_good.offer()
        if is_local(optimizer):
            self.recorder.round(position.steps)
        if optimizer.progress >= position.next_evaluation and not optimizer.finished:
            gap = self.config.evaluate_every_epochs * self.length.epoch
            position.next_evaluation = (optimizer.progress // gap + 1) * gap
            self._evaluate(console)

    def _say_resumed(self, console: Console, resumed: Resumed) -> None:
        ranks = resumed.contents["num_workers"]
        how = (
            ""
            if resumed.state is not None
            else f", averaged over the {ranks} rank{'s' if ranks > 1 else ''} that wrote it"
        )
        console.say(f"continuing from the checkpoint of step {resumed.step}{how}")
        before, now = resumed.contents["versions"], versions()
        if changed := [f"{name} {before.get(name)} → {now.get(name)}" for name in now if before.get(name) != now[name]]:
            console.say(f"note: other versions than before, so not bit for bit the same: {', '.join(changed)}")

    def _micro_batch(self, batches: Iterator[Batch]) -> None:
        optimizer = self.optimizer
        if not optimizer.micro_batches:
            lr = self.length.schedule(optimizer.progress)
            for group in optimizer.param_groups:
                group["lr"] = lr
        start = time.perf_counter()
        x, y = next(batches)
        self.totals.waiting_for_data += time.perf_counter() - start
        with self._autocast():
            logits = self.forward(x.contiguous(memory_format=self.memory_format))
            loss = self.criterion(logits, y)
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        optimizer.record_loss(loss)
        self.window.add(loss, logits, y)
        self.scaler.step(optimizer)
        self.scaler.update()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.config.precision))

    def _evaluate(self, console: Console) -> None:
        """Evaluates the average; a collective."""
        start = time.perf_counter()
        averaging = self.optimizer.seconds_averaging
        with self.totals.beside_training():
            evaluation = self._evaluation()
        self.optimizer.seconds_averaging = averaging  # what is averaged for an evaluation counts as evaluating
        self.totals.evaluating += time.perf_counter() - start
        position, progress = self.position, self.optimizer.progress
        position.evaluation, position.evaluated_at = evaluation, progress
        self.recorder.evaluation(evaluation, position.steps)
        if evaluation.accuracy > position.best:
            position.best = evaluation.accuracy
            if self.communicator.rank == 0:
                self.best_model.take(copy_of(self.model))
                self.coordinator.writer.also(self.best_model.write)
        console.say(
            f"epoch {progress / self.length.epoch:7.2f}  test accuracy {100 * evaluation.accuracy:.2f} %  "
            f"loss {evaluation.loss:.4f}"
        )

    def _evaluation(self) -> Evaluation:
        self.optimizer.synchronize()
        if "reestimate" in self.optimizer.buffer_policies.values():
            self.optimizer.reestimate_buffers(self._reestimation_batches())
        batches = evaluation_batches(
            self.test_data,
            self.config.evaluation_batch_size,
            rank=self.communicator.rank,
            num_workers=self.communicator.size,
            crop=self.images.test_crop,
            transform=self.images.test_transform,
            device=self.device,
            threads=self.config.data.threads,
        )
        formatted = ((x.contiguous(memory_format=self.memory_format), y) for x, y in batches)
        with self._autocast(), self.optimizer.published():
            return evaluate(self.forward, formatted, self.communicator, self.device, self.test_data.num_classes)

    def _reestimation_batches(self) -> Iterator[torch.Tensor]:
        """The same images whatever the number of steps before: the first batches of an order of their own."""
        loader = self._loader(seed=self.config.seed + 1)
        batches = loader.endless()
        for _ in range(self.config.method.reestimate_batches):
            yield next(batches)[0].contiguous(memory_format=self.memory_format)
        batches.close()

    # -- the end -------------------------------------------------------------------------------------------------------

    def _summary(self, evaluation: Evaluation) -> Summary:
        optimizer, totals, steps = self.optimizer, self.totals, self.position.steps
        return Summary(
            evaluation=evaluation,
            steps=steps,
            micro_batches=steps * optimizer.accumulate,
            rounds=optimizer.round,
            progress=optimizer.progress,
            scale_invariant_epochs=optimizer.progress / self.length.epoch,
            data_epochs=self.loader.epoch,
            collectives=totals.collectives,
            bytes_sent=totals.bytes_sent,
            data_parallel_bytes=self.recorder.data_parallel_bytes(steps),
            seconds=totals.seconds(),
        )

    def _save_last_good(self) -> str:
        """Saves the last good average on rank 0, and says where it is; a collective."""
        name = "last_good.pt"
        path = self.directory / name
        told = f"The last good average is in {path}."
        if self.last_good is not None:
            try:
                if not self.last_good.save(self.output, name) and not self.output.exists(name):
                    told = f"The checkpoints in {self.directory / CHECKPOINTS} are from before."
            except (OSError, RuntimeError) as error:
                told = f"The last good average could not be saved in {path}: {error}"
        return str(self.communicator.gather(told, "hvdlocal.last_good")[0])
