"""A training run: from a configuration to a trained, averaged model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvdlocal.averaging import NonFiniteError
from hvdlocal.communicator import Communicator, require_agreement, succeed_together
from hvdlocal.data import Loader, ShardedDataset, evaluation_batches
from hvdlocal.models import build_model
from hvdlocal.training import run_directory
from hvdlocal.training.checkpoint import LastGood, save_model
from hvdlocal.training.config import TrainConfig, check_ranges, unused_settings
from hvdlocal.training.console import Console
from hvdlocal.training.environment import choose_device, describe_run, set_threads, versions
from hvdlocal.training.evaluation import Evaluation, evaluate
from hvdlocal.training.images import configured_images
from hvdlocal.training.metrics import JsonLines, Metrics, NoMetrics, TensorBoard
from hvdlocal.training.presets import build_optimizer, build_scaling, is_local, micro_batches_per_step
from hvdlocal.training.schedules import build_schedule

Batch = tuple[torch.Tensor, torch.Tensor]


class DivergedError(ArithmeticError):
    """The run ended in NaN or infinity; the message says which model was saved. Raised on all ranks."""


@dataclass
class Clock:
    """Seconds of this rank, by what they were spent on; the rest of `elapsed` is computing."""

    start: float
    waiting_for_data: float = 0.0
    evaluating: float = 0.0

    @property
    def elapsed(self) -> float:
        """Since training began."""
        return time.perf_counter() - self.start


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
    stopped_early: bool

    @property
    def communication_saved(self) -> float:
        """Share of the bytes that data parallelism would have sent, averaging the gradient of every micro-batch."""
        return 1 - self.bytes_sent / self.data_parallel_bytes if self.data_parallel_bytes else 0.0


class Trainer:
    """One rank's part of a run. Building it and `run` are collectives.

    Args:
        config: what to do.
        communicator: the ranks.
        config_text: the configuration as YAML, written beside the run.

    Raises:
        SetupError, DisagreementError: the run cannot start; the same on every rank.
    """

    def __init__(self, config: TrainConfig, communicator: Communicator, config_text: str = "") -> None:
        self.config = config
        self.communicator = communicator
        self.directory = Path(config.output)
        succeed_together(communicator, self._check, "hvdlocal.check")
        data = config.data
        self.train_data = ShardedDataset(
            data.path, data.train_split, storage=data.storage, share=data.share, communicator=communicator
        )
        self.test_data = ShardedDataset(data.path, data.test_split, communicator=communicator)
        succeed_together(communicator, self._prepare, "hvdlocal.prepare")
        require_agreement(communicator, self._facts(), "hvdlocal.preflight")
        self.threads = set_threads(config.threads, communicator)
        self.unused = unused_settings(config)
        self.optimizer = build_optimizer(config, self.model, self.budget, self.epoch)
        self.forward: nn.Module = torch.compile(self.model) if config.model.compile else self.model  # type: ignore[assignment]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        environment = describe_run(communicator, self.device, self.threads) | {
            "training images": self.train_data.describe(),
            "settings without effect": self.unused,
        }
        if self.train_data.kind == "jpeg":
            from hvdlocal.data.decode import decoder_description  # loads OpenCV

            environment["decoder"] = decoder_description()
        self.metrics: Metrics = NoMetrics()
        succeed_together(communicator, lambda: self._open_records(config_text, environment), "hvdlocal.records")
        # Dropout and the like differ between ranks from here on; the weights above do not.
        torch.manual_seed((config.seed * communicator.size + communicator.rank + 1) % 2**63)

    # -- before the first step ---------------------------------------------------------------------------------------

    def _check(self) -> None:
        """What can be known to be wrong before any data are read."""
        check_ranges(self.config)
        self.device = choose_device(self.config.device, self.communicator)
        if self.communicator.rank == 0:
            run_directory.check(self.directory, self.config.overwrite)

    def _prepare(self) -> None:
        """Everything else that can fail for a user's mistake and needs no other rank."""
        config, communicator = self.config, self.communicator
        if self.train_data.shape != self.test_data.shape or self.train_data.classes != self.test_data.classes:
            raise ValueError(f"{config.data.path}: the training and the test images differ in shape or classes")
        self.images = configured_images(config.data, self.train_data)
        self.loader = self._loader(config.seed)
        scaling = build_scaling(config.method)
        reference = scaling.reference_batches(communicator.size, micro_batches_per_step(config.method))
        self.epoch = self.loader.steps_per_epoch * communicator.size / reference
        self.budget = config.epochs * self.epoch
        self.schedule = build_schedule(config.schedule, config.optimizer.lr, self.budget, self.epoch)

        torch.manual_seed(config.seed)
        self.model = build_model(config.model.name, self.train_data.num_classes, self.images.shape).to(self.device)
        self.memory_format = torch.channels_last if config.model.channels_last else torch.contiguous_format
        self.model = self.model.to(memory_format=self.memory_format)  # type: ignore[call-overload]

    def _loader(self, seed: int) -> Loader:
        data, images = self.config.data, self.images
        return Loader(
            self.train_data,
            data.batch_size,
            rank=self.communicator.rank,
            num_workers=self.communicator.size,
            seed=seed,
            order=data.order,
            tail=data.tail,
            crop=images.crop,
            transform=images.transform,
            mix=images.mix,
            device=self.device,
            prefetch=data.prefetch,
            threads=data.threads,
        )

    def _facts(self) -> dict[str, Any]:
        facts = {f"config {key}": value for key, value in _flat(asdict(self.config)).items()}
        facts |= {f"version of {package}": version for package, version in versions().items()}
        facts["training data (fingerprint)"] = self.train_data.fingerprint
        facts["test data (fingerprint)"] = self.test_data.fingerprint
        facts["kind of device"] = self.device.type
        return facts

    def _open_records(self, config_text: str, environment: dict[str, Any]) -> None:
        if self.communicator.rank == 0:
            run_directory.clear(self.directory)
            run_directory.describe(self.directory, config_text, environment)
            self.metrics = JsonLines(self.directory / "metrics.jsonl")
            if self.config.tensorboard:
                self.metrics = TensorBoard(self.directory / "tensorboard", self.metrics)

    # -- training ----------------------------------------------------------------------------------------------------

    def run(self) -> Summary:
        """Trains until the budget is used up, evaluates, and saves the averaged model.

        Raises:
            DivergedError: a loss became NaN or infinite; on all ranks, with a model saved.
            CommunicationError: another rank ended.
        """
        console = Console(self.communicator, self.budget, self.epoch)
        try:
            return self._train(console)
        except NonFiniteError as error:
            raise DivergedError(f"{error} {self._save_last_good()}") from error
        finally:
            console.close()
            self.metrics.close()

    def _train(self, console: Console) -> Summary:
        config, optimizer = self.config, self.optimizer
        traffic = self.communicator.traffic
        self.clock = Clock(time.perf_counter())
        self.last_good = LastGood(self.model) if self.communicator.rank == 0 else None
        self._bytes_before, self._collectives_before = traffic.bytes, traffic.collectives
        self._evaluation_bytes = self._evaluation_collectives = 0
        window = _Window(self.device)
        evaluation, evaluated_at = None, -1.0
        next_evaluation = evaluation_gap = config.evaluate_every_epochs * self.epoch
        next_line = config.log_every_seconds
        steps = 0

        console.say(f"training images: {self.train_data.describe()}")
        if self.unused:
            console.say(f"note: without effect in this run: {', '.join(self.unused)}")
        batches = self.loader.endless()
        self.model.train()
        while not optimizer.finished and not optimizer.stop_requested:
            self._micro_batch(batches, window)
            if optimizer.micro_batches:
                continue
            steps += 1
            due = self.clock.elapsed >= next_line
            if due:
                next_line = self.clock.elapsed + config.log_every_seconds
                self._write_window(window, steps)
            console.progress(optimizer.progress, self._status(), due)
            if not optimizer.in_sync:
                continue
            if self.last_good is not None:
                self.last_good.offer()
            if is_local(optimizer):
                self._write_round(steps)
            if optimizer.progress >= next_evaluation and not optimizer.finished:
                next_evaluation = (optimizer.progress // evaluation_gap + 1) * evaluation_gap
                evaluation, evaluated_at = self._evaluate(console, steps), optimizer.progress
        batches.close()

        if window.micro_batches:
            self._write_window(window, steps)
        if evaluation is None or evaluated_at != optimizer.progress:
            evaluation = self._evaluate(console, steps)
        summary = self._summary(evaluation, steps)
        if self.communicator.rank == 0:
            save_model(self.model, self.directory / "model.pt")
        self.metrics.write("end", steps, **asdict(summary), communication_saved=summary.communication_saved)
        return summary

    def _micro_batch(self, batches: Iterator[Batch], window: _Window) -> None:
        optimizer = self.optimizer
        if not optimizer.micro_batches:
            lr = self.schedule(optimizer.progress)
            for group in optimizer.param_groups:
                group["lr"] = lr
        start = time.perf_counter()
        x, y = next(batches)
        self.clock.waiting_for_data += time.perf_counter() - start
        with self._autocast():
            logits = self.forward(x.contiguous(memory_format=self.memory_format))
            loss = self.criterion(logits, y)
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        optimizer.record_loss(loss)
        window.add(loss, logits, y)
        self.scaler.step(optimizer)
        self.scaler.update()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.config.precision))

    def _evaluate(self, console: Console, steps: int) -> Evaluation:
        """Evaluates the average; a collective."""
        start = time.perf_counter()
        averaging = self.optimizer.seconds_averaging
        traffic = self.communicator.traffic
        before = (traffic.bytes, traffic.collectives)
        self.optimizer.synchronize()
        if self.config.method.buffers == "reestimate":
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
        with self._autocast():
            evaluation = evaluate(self.forward, formatted, self.communicator, self.device, self.test_data.num_classes)
        self.optimizer.seconds_averaging = averaging  # what is averaged for an evaluation counts as evaluating
        self.clock.evaluating += time.perf_counter() - start
        self._evaluation_bytes += traffic.bytes - before[0]
        self._evaluation_collectives += traffic.collectives - before[1]
        self.metrics.write(
            "evaluation",
            steps,
            progress=self.optimizer.progress,
            epoch=self.optimizer.progress / self.epoch,
            data_epoch=self.loader.epoch,
            elapsed_seconds=self.clock.elapsed,
            **asdict(evaluation),
        )
        self.metrics.flush()
        console.say(
            f"epoch {self.optimizer.progress / self.epoch:7.2f}  test accuracy {100 * evaluation.accuracy:.2f} %  "
            f"loss {evaluation.loss:.4f}"
        )
        return evaluation

    def _reestimation_batches(self) -> Iterator[torch.Tensor]:
        """The same images whatever the number of steps before: the first batches of an order of their own."""
        loader = self._loader(self.config.seed + 1)
        batches = loader.endless()
        for _ in range(self.config.method.reestimate_batches):
            yield next(batches)[0].contiguous(memory_format=self.memory_format)
        batches.close()

    # -- records -----------------------------------------------------------------------------------------------------

    def _status(self) -> str:
        optimizer = self.optimizer
        loss = "" if optimizer.loss is None else f"loss {optimizer.loss:.4f}  "
        lr = optimizer.param_groups[0]["lr"]
        return f"{loss}lr {lr * optimizer.gain:.4g} = {lr:.4g}×{optimizer.gain:.2f}  H {optimizer.period}"

    def _state(self) -> dict[str, Any]:
        optimizer = self.optimizer
        lr = optimizer.param_groups[0]["lr"]
        return {
            "progress": optimizer.progress,
            "epoch": optimizer.progress / self.epoch,
            "data_epoch": self.loader.epoch,
            "base_lr": lr,
            "lr": lr * optimizer.gain,
            "gain": optimizer.gain,
            "period": optimizer.period,
            "grad_sqr": optimizer.grad_sqr,
            "grad_var": optimizer.grad_var,
        }

    def _write_round(self, steps: int) -> None:
        optimizer = self.optimizer
        self.metrics.write(
            "round",
            steps,
            round=optimizer.round,
            **self._state(),
            loss=optimizer.loss,
            divergence=optimizer.divergence,
            averaging_seconds=optimizer.seconds_averaging,
            bytes_sent=self._bytes_sent(),
            elapsed_seconds=self.clock.elapsed,
        )

    def _write_window(self, window: _Window, steps: int) -> None:
        loss, accuracy = window.take()
        self.metrics.write(
            "steps",
            steps,
            **self._state(),
            loss=loss,
            accuracy=accuracy,
            divergence=self.optimizer.divergence,
            bytes_sent=self._bytes_sent(),
            **{f"{name}_seconds": seconds for name, seconds in self._seconds().items()},
            **{f"loader_{name}": value for name, value in self.loader.stats().items()},
        )
        self.metrics.flush()

    def _seconds(self) -> dict[str, float]:
        spent = {
            "averaging": self.optimizer.seconds_averaging,
            "waiting_for_data": self.clock.waiting_for_data,
            "evaluating": self.clock.evaluating,
        }
        elapsed = self.clock.elapsed
        return {"elapsed": elapsed, "computing": elapsed - sum(spent.values()), **spent}

    def _bytes_sent(self) -> int:
        return self.communicator.traffic.bytes - self._bytes_before - self._evaluation_bytes

    def _summary(self, evaluation: Evaluation, steps: int) -> Summary:
        optimizer, traffic = self.optimizer, self.communicator.traffic
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        micro_batches = steps * optimizer.accumulate
        return Summary(
            evaluation=evaluation,
            steps=steps,
            micro_batches=micro_batches,
            rounds=optimizer.round,
            progress=optimizer.progress,
            scale_invariant_epochs=optimizer.progress / self.epoch,
            data_epochs=self.loader.epoch,
            collectives=traffic.collectives - self._collectives_before - self._evaluation_collectives,
            bytes_sent=self._bytes_sent(),
            data_parallel_bytes=4 * trained * micro_batches if self.communicator.size > 1 else 0,
            seconds=self._seconds(),
            stopped_early=not optimizer.finished,
        )

    def _save_last_good(self) -> str:
        """Saves the last good average on rank 0, and says where it is."""
        path = self.directory / "last_good.pt"
        if self.last_good is not None:
            self.last_good.save(path)
        return f"The last good average is in {path}."


class _Window:
    """Means of this rank's training losses and accuracies since the last line."""

    def __init__(self, device: torch.device) -> None:
        self._totals = torch.zeros(2, device=device)
        self._images = 0
        self.micro_batches = 0

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Takes in one micro-batch, without waiting for its device."""
        if labels.is_floating_point():  # MixUp's; the greater part counts
            labels = labels.argmax(1)
        correct = (logits.detach().argmax(1) == labels).sum()
        self._totals += torch.stack([loss.detach().float(), correct.float()])
        self._images += len(labels)
        self.micro_batches += 1

    def take(self) -> tuple[float, float]:
        """(mean loss, accuracy), and starts anew."""
        loss, correct = self._totals.tolist()
        result = loss / self.micro_batches, correct / self._images
        self._totals.zero_()
        self._images = self.micro_batches = 0
        return result


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves
