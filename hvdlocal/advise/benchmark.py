"""Training with a clock: real steps and real collectives of throw-away replicas, of which `measure` takes turns.

What is timed is what training runs: the loader, the forward and backward pass, and `step` of the very optimizers, with their
arenas and collectives. Nothing is written.
"""

from __future__ import annotations

import random
import time
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from hvdlocal.advise.measurements import Series, StepTimes, SyncStepTimes, undo_moving_average
from hvdlocal.averaging import LocalOptimizer, SynchronousOptimizer
from hvdlocal.averaging.statistics import default_smoothing
from hvdlocal.communicator import Communicator, require_agreement, succeed_together
from hvdlocal.data import ShardedDataset
from hvdlocal.training.builders import check_model, configured_loader, facts, memory_format, model_from_config
from hvdlocal.training.config import MethodConfig, PeriodConfig, Preset, TrainConfig
from hvdlocal.training.config_checks import check_ranges
from hvdlocal.training.environment import choose_device, set_threads
from hvdlocal.training.preprocessing import preprocessing_from_config
from hvdlocal.training.presets import build_optimizer, build_period
from hvdlocal.training.run_length import run_length

PERIOD = 4
"""H of the short run: the steps within a round are timed between its first, which takes statistics, and its last."""


class Benchmark:
    """What all measurements share. Building it is a collective.

    Args:
        config: model, data, optimizer and method.
        communicator: the ranks.

    Raises:
        SetupError, DisagreementError: as for `measure`.
    """

    def __init__(self, config: TrainConfig, communicator: Communicator) -> None:
        self.config = config
        self.communicator = communicator
        succeed_together(communicator, self._check, "hvdlocal.check")
        data = config.data
        self.data = ShardedDataset(
            data.path, data.train_split, storage=data.storage, share=data.share, communicator=communicator
        )
        succeed_together(communicator, self._prepare, "hvdlocal.prepare")
        agreed = facts(config, self.device, {"training": self.data.fingerprint})
        require_agreement(communicator, agreed, "hvdlocal.preflight")
        set_threads(config.threads, communicator)
        self.batches = self.loader.endless()

    def _check(self) -> None:
        check_ranges(self.config)
        self.device = choose_device(self.config.device, self.communicator)

    def _prepare(self) -> None:
        config, workers = self.config, self.communicator.size
        self.images = preprocessing_from_config(config.data, self.data)
        check_model(config, self.data, self.images, workers)
        rank = self.communicator.rank
        self.loader = configured_loader(config, self.data, self.images, self.device, rank=rank, num_workers=workers)
        # The method in the configuration is not run, but a mistake in it should be reported now.
        configured = run_length(config, self.loader.steps_per_epoch, workers)
        if config.method.is_local:
            build_period(config.method.period, config.optimizer.lr, 0.0, configured.epoch)
        self.reference = configured.reference_batches
        short_run = replace(config, method=self.method("local-ada", PERIOD, config.method.statistics))
        self.length = run_length(short_run, self.loader.steps_per_epoch, workers)
        self.parameters = sum(p.numel() for p in self.model().parameters() if p.requires_grad)

    def candidates(self) -> list[Candidate]:
        """What has a payload of its own; sync is like acc-lin, local like local-lin. A collective."""
        variants: list[tuple[str, Preset, str]] = [
            ("acc-lin", "acc-lin", "sketch"),
            ("acc-ada", "acc-ada", "sketch"),
            ("local-lin", "local-lin", "sketch"),
            ("local-ada sketch", "local-ada", "sketch"),
            ("local-ada exact", "local-ada", "exact"),
        ]
        if self.config.method.preset == "local-ada-nostale":
            variants.append(("local-ada-nostale", "local-ada-nostale", self.config.method.statistics))
        return [Candidate(self, *variant) for variant in variants]

    def close(self) -> None:
        """Ends the loading."""
        self.batches.close()

    def model(self) -> nn.Module:
        """The configured model as it is before training."""
        return model_from_config(self.config, self.data.num_classes, self.images, self.device)

    @property
    def smoothing(self) -> float:
        """θ as the trainer has it by default, but the same for every round, so that single estimates can be recovered."""
        method = self.config.method
        if method.smoothing is not None:
            return method.smoothing
        return default_smoothing(self.communicator.size * PERIOD * method.accumulate)

    @property
    def memory_format(self) -> torch.memory_format:
        """Of the model and its inputs."""
        return memory_format(self.config.model)

    def optimizer(self, preset: Preset, period: int, statistics: str) -> LocalOptimizer | SynchronousOptimizer:
        """An optimizer with a replica of its own, as the configuration has it but for the method; a collective."""
        config = replace(self.config, method=self.method(preset, period, statistics))
        return build_optimizer(config, self.model(), self.length, self.communicator)

    def method(self, preset: Preset, period: int, statistics: str) -> MethodConfig:
        """The configured method with another preset and a constant period."""
        return replace(
            self.config.method,
            preset=preset,
            period=PeriodConfig(period=period),
            statistics=statistics,  # type: ignore[arg-type]
            smoothing=self.smoothing,
            accumulate=1 if preset.startswith("acc") else self.config.method.accumulate,
        )

    def synchronize_device(self) -> None:
        """Waits for what a GPU has been asked for: clocks should not count it later."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Candidate:
    """Steps that end in a collective, with a replica of its own. Building it, and a turn, are collectives.

    Args:
        bench: what all share.
        name: of what is measured.
        preset: the method.
        statistics: of local-ada.
    """

    def __init__(self, bench: Benchmark, name: str, preset: Preset, statistics: str) -> None:
        self.name = name
        self._bench = bench
        self._optimizer = bench.optimizer(preset, 2 if preset.startswith("acc") else 1, statistics)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0  # the same work, but the model stays as it is
        parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._gradients = [(p, torch.randn_like(p).mul_(1e-3)) for p in parameters]
        # Horovod's cycle would start with every barrier; a random pause, the same on all ranks, lets it be anywhere.
        self._pauses = random.Random(0)
        self._samples: list[tuple[float, float]] = []
        self._collect: list[float] = []
        self._bytes = 0

    def turn(self) -> None:
        """One step, of two micro-batches with accumulation."""
        optimizer, communicator = self._optimizer, self._bench.communicator
        for _ in range(optimizer.accumulate - 1):
            self._collect.append(self._step())
        communicator.barrier("hvdlocal.measure")
        time.sleep(self._pauses.uniform(0, 0.01))
        averaging, sent = optimizer.seconds_averaging, communicator.traffic.bytes
        step = self._step()
        self._samples.append((step, optimizer.seconds_averaging - averaging))
        self._bytes = communicator.traffic.bytes - sent

    def take(self) -> SyncStepTimes:
        """What was measured since the last call; a collective."""
        communicator = self._bench.communicator
        everyone = communicator.gather((self._samples, Series.of(self._collect)), "hvdlocal.closing")
        slowest = [
            tuple(map(max, zip(*ranks, strict=True))) for ranks in zip(*(one for one, _ in everyone), strict=True)
        ]
        step, collective = zip(*slowest, strict=True)
        collect = max((one for _, one in everyone), key=lambda one: one.mean)
        self._samples, self._collect = [], []
        return SyncStepTimes(self._bytes, Series.of(step), Series.of(collective), collect)

    def _step(self) -> float:
        for p, gradient in self._gradients:
            p.grad = gradient
        self._bench.synchronize_device()
        start = time.perf_counter()
        self._optimizer.step()
        self._bench.synchronize_device()
        return time.perf_counter() - start


class StepTimer:
    """Training's inner loop with a clock, with LocalAdaScale. Building it, and a round, are collectives.

    Args:
        bench: loader, schedule and settings.
        preset, period: another method, for which there are no statistics.

    Attributes:
        optimizer: that trains.
        averages: moving averages of (G, σ²) after each round that gave an estimate.
        rounds: this rank's seconds of computing in each round.
    """

    def __init__(self, bench: Benchmark, preset: Preset = "local-ada", period: int = PERIOD) -> None:
        config = bench.config
        self._bench = bench
        self.optimizer = bench.optimizer(preset, period, config.method.statistics)
        self.averages: list[tuple[float, float]] = []
        self.rounds: list[float] = []
        model = self.optimizer.model.train()
        self._forward: nn.Module = torch.compile(model) if config.model.compile else model  # type: ignore[assignment]
        self._criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self._scaler = torch.amp.GradScaler(bench.device.type, enabled=config.precision == "float16")
        self._times: tuple[list[float], ...] = ([], [], [], [])

    def round(self) -> None:
        """Up to the next averaging."""
        optimizer = self.optimizer
        micro_batch, waiting, update, collect = self._times
        closed, before = False, len(micro_batch)
        while not closed:
            first = optimizer.in_sync
            waited, computed, stepped = self._micro_batch()
            complete = not optimizer.micro_batches
            closed = complete and optimizer.in_sync
            micro_batch.append(waited + computed)
            waiting.append(waited)
            if not complete:
                collect.append(stepped)
            elif not first and not closed:
                update.append(stepped)
        self.rounds.append(sum(micro_batch[before:]))
        if optimizer.grad_sqr is not None and optimizer.grad_var is not None:
            now = (optimizer.grad_sqr, optimizer.grad_var)
            if self.averages[-1:] != [now]:  # an overflow gives no estimate
                self.averages.append(now)

    def take(self) -> StepTimes:
        """What this rank's clock showed since the last call."""
        pace = StepTimes(*map(Series.of, self._times))
        for times in self._times:
            times.clear()
        return pace

    def estimates(self) -> tuple[list[float], list[float]]:
        """Single estimates of G and of σ², of which `averages` are the moving averages."""
        theta = self._bench.smoothing
        return (
            undo_moving_average([grad_sqr for grad_sqr, _ in self.averages], theta),
            undo_moving_average([grad_var for _, grad_var in self.averages], theta),
        )

    def _micro_batch(self) -> tuple[float, float, float]:
        """One micro-batch: seconds of waiting for its images, of forward and backward pass, and of the optimizer's `step`."""
        bench, optimizer, config = self._bench, self.optimizer, self._bench.config
        if not optimizer.micro_batches:
            lr = bench.length.schedule(optimizer.progress) / bench.reference
            for group in optimizer.param_groups:
                group["lr"] = lr
        start = time.perf_counter()
        x, y = next(bench.batches)
        bench.synchronize_device()
        loaded = time.perf_counter()
        half = config.precision != "float32"
        with torch.autocast(bench.device.type, dtype=getattr(torch, config.precision)) if half else nullcontext():
            loss = self._criterion(self._forward(x.contiguous(memory_format=bench.memory_format)), y)
        optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        optimizer.record_loss(loss)
        bench.synchronize_device()
        computed = time.perf_counter()
        self._scaler.step(optimizer)
        self._scaler.update()
        bench.synchronize_device()
        return loaded - start, computed - loaded, time.perf_counter() - computed
