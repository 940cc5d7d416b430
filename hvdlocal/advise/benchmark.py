"""Times real steps and real collectives of temporary replicas, which `measure` runs in alternation.

The measured code is that of training: the loader, the forward and backward pass, and `step` of the same optimizers with their
flat buffers and collectives. Nothing is written.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace

import torch

from hvdlocal.advise.measurements import SampleSummary, StepTimes, SyncStepTimes, undo_moving_average
from hvdlocal.averaging import LocalOptimizer, SynchronousOptimizer
from hvdlocal.averaging.statistics import default_smoothing
from hvdlocal.communicator import Communicator
from hvdlocal.training.config import MethodConfig, PeriodConfig, Preset, TrainConfig
from hvdlocal.training.optimizers import build_optimizer
from hvdlocal.training.run_length import run_length
from hvdlocal.training.session import Session
from hvdlocal.training.step import TrainingStep

PERIOD = 4
"""H of the short run. The timed steps of a round lie between its first, which takes statistics, and its last."""


class Benchmark:
    """The parts that all measurements share. Building it is a collective.

    Args:
        config: model, data, optimizer and method.
        communicator: the ranks.

    Attributes:
        session: data, model and settings.
        length: length of a run of the timed methods, whose base learning rate is that of one worker.
        reference_batches: divisor of the configured base learning rate for these methods.
        batches: the training batches, without an end.

    Raises:
        SetupError, DisagreementError: as for `measure`.
    """

    def __init__(self, config: TrainConfig, communicator: Communicator) -> None:
        self.session = session = Session(config, communicator, with_test_data=False)
        timed = replace(config, method=self.method("local-ada", PERIOD, config.method.statistics))
        self.length = run_length(timed, session.loader.steps_per_epoch, communicator.size)
        self.reference_batches = session.length.reference_batches
        self.batches = session.loader.endless()

    def candidates(self) -> list[Candidate]:
        """Returns one candidate per distinct payload (sync has acc-lin's, local has local-lin's); a collective."""
        variants: list[tuple[str, Preset, str]] = [
            ("acc-lin", "acc-lin", "sketch"),
            ("acc-ada", "acc-ada", "sketch"),
            ("local-lin", "local-lin", "sketch"),
            ("local-ada sketch", "local-ada", "sketch"),
            ("local-ada exact", "local-ada", "exact"),
        ]
        method = self.session.config.method
        if method.preset == "local-ada-nostale":
            variants.append(("local-ada-nostale", "local-ada-nostale", method.statistics))
        return [Candidate(self, *variant) for variant in variants]

    def close(self) -> None:
        """Ends the loading and closes the data."""
        self.batches.close()
        self.session.close()

    @property
    def smoothing(self) -> float:
        """θ: the trainer's default, but the same for every round, so that single estimates can be recovered."""
        method = self.session.config.method
        if method.smoothing is not None:
            return method.smoothing
        return default_smoothing(self.session.communicator.size * PERIOD * method.accumulate)

    def optimizer(self, preset: Preset, period: int, statistics: str) -> LocalOptimizer | SynchronousOptimizer:
        """Returns a configured optimizer with another method and a replica of its own; a collective."""
        session = self.session
        config = replace(session.config, method=self.method(preset, period, statistics))
        return build_optimizer(config, session.new_model(), self.length, session.communicator)

    def method(self, preset: Preset, period: int, statistics: str) -> MethodConfig:
        """Returns the configured method with another preset and a constant period."""
        method = self.session.config.method
        return replace(
            method,
            preset=preset,
            period=PeriodConfig(period=period),
            statistics=statistics,  # type: ignore[arg-type]
            smoothing=self.smoothing,
            accumulate=1 if preset.startswith("acc") else method.accumulate,
        )

    def synchronize_device(self) -> None:
        """Waits until a GPU has finished its work, so that a clock does not count it later."""
        if self.session.device.type == "cuda":
            torch.cuda.synchronize(self.session.device)


class Candidate:
    """Steps that end in a collective, with their own replica. Building it and running a trial are collectives.

    Args:
        bench: the shared parts.
        name: name of the candidate.
        preset: the method.
        statistics: the statistics of local-ada.
    """

    def __init__(self, bench: Benchmark, name: str, preset: Preset, statistics: str) -> None:
        self.name = name
        self._bench = bench
        self._optimizer = bench.optimizer(preset, 2 if preset.startswith("acc") else 1, statistics)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0  # the same work, but the model does not change
        parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._gradients = [(p, torch.randn_like(p).mul_(1e-3)) for p in parameters]
        # Every barrier would be in phase with Horovod's cycle; a random pause, equal on all ranks, prevents that.
        self._pauses = random.Random(0)
        self._samples: list[tuple[float, float]] = []
        self._collect: list[float] = []
        self._bytes = 0

    def trial(self) -> None:
        """Times one step; with accumulation, a step of two micro-batches."""
        optimizer, communicator = self._optimizer, self._bench.session.communicator
        for _ in range(optimizer.accumulate - 1):
            self._collect.append(self._step())
        communicator.barrier("hvdlocal.measure")
        time.sleep(self._pauses.uniform(0, 0.01))
        averaging, sent = optimizer.seconds_averaging, communicator.traffic.bytes
        step = self._step()
        self._samples.append((step, optimizer.seconds_averaging - averaging))
        self._bytes = communicator.traffic.bytes - sent

    def take(self) -> SyncStepTimes:
        """Returns the measurements since the last call; a collective."""
        communicator = self._bench.session.communicator
        everyone = communicator.gather((self._samples, SampleSummary.of(self._collect)), "hvdlocal.closing")
        slowest = [
            tuple(map(max, zip(*ranks, strict=True))) for ranks in zip(*(one for one, _ in everyone), strict=True)
        ]
        step, collective = zip(*slowest, strict=True)
        collect = max((one for _, one in everyone), key=lambda one: one.mean)
        self._samples, self._collect = [], []
        return SyncStepTimes(self._bytes, SampleSummary.of(step), SampleSummary.of(collective), collect)

    def _step(self) -> float:
        for p, gradient in self._gradients:
            p.grad = gradient
        self._bench.synchronize_device()
        start = time.perf_counter()
        self._optimizer.step()
        self._bench.synchronize_device()
        return time.perf_counter() - start


class StepTimer:
    """Times training's inner loop, by default with LocalAdaScale. Building it and running a round are collectives.

    Args:
        bench: the shared parts.
        preset, period: another method; it has no statistics.

    Attributes:
        optimizer: the optimizer that trains.
        averages: moving averages of (G, σ²) after each round that gave an estimate.
        rounds: this rank's seconds of computing in each round.
    """

    def __init__(self, bench: Benchmark, preset: Preset = "local-ada", period: int = PERIOD) -> None:
        self._bench = bench
        self.optimizer = bench.optimizer(preset, period, bench.session.config.method.statistics)
        self._step = TrainingStep(bench.session, self.optimizer, self._learning_rate)
        self.averages: list[tuple[float, float]] = []
        self.rounds: list[float] = []
        self.optimizer.model.train()
        self._times: tuple[list[float], ...] = ([], [], [], [])

    def round(self) -> None:
        """Trains up to and including the next averaging."""
        optimizer = self.optimizer
        micro_batch, waiting, update, collect = self._times
        closed, before = False, len(micro_batch)
        while not closed:
            first = not optimizer.round_under_way
            waited, computed, stepped = self._micro_batch()
            complete = not optimizer.micro_batches
            closed = complete and not optimizer.round_under_way
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
        """Returns this rank's times since the last call."""
        pace = StepTimes(*map(SampleSummary.of, self._times))
        for times in self._times:
            times.clear()
        return pace

    def estimates(self) -> tuple[list[float], list[float]]:
        """Returns the single estimates of G and of σ², of which `averages` are the moving averages."""
        theta = self._bench.smoothing
        return (
            undo_moving_average([grad_sqr for grad_sqr, _ in self.averages], theta),
            undo_moving_average([grad_var for _, grad_var in self.averages], theta),
        )

    def _learning_rate(self, progress: float) -> float:
        """Returns γ of one worker."""
        return self._bench.length.schedule(progress) / self._bench.reference_batches

    def _micro_batch(self) -> tuple[float, float, float]:
        """Trains on one micro-batch.

        Returns:
            Seconds of waiting for its samples, of forward and backward pass, and of the optimizer's `step`.
        """
        bench = self._bench
        start = time.perf_counter()
        batch = next(bench.batches)
        bench.synchronize_device()
        loaded = time.perf_counter()
        self._step.compute(batch)
        bench.synchronize_device()
        computed = time.perf_counter()
        self._step.update()
        bench.synchronize_device()
        return loaded - start, computed - loaded, time.perf_counter() - computed
