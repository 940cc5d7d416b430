"""Times real steps of temporary replicas, beside the collectives (`candidates`) with which `measure` alternates them.

The measured code is that of training: the loader, the forward and backward pass, and `step` of the same optimizers with their
flat buffers and collectives. Nothing is written.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch

from hvdlocal.advise.measurements import SampleSummary, StepTimes, undo_moving_average
from hvdlocal.averaging import LocalOptimizer, SynchronousOptimizer
from hvdlocal.averaging.buckets import BUCKET_BYTES
from hvdlocal.averaging.setup import trainable
from hvdlocal.averaging.statistics import default_smoothing
from hvdlocal.communicator import Communicator
from hvdlocal.communicator.islands import form_islands, node_name
from hvdlocal.training.config import MethodConfig, OuterConfig, PeriodConfig, Preset, TrainConfig
from hvdlocal.training.optimizers import build_optimizer
from hvdlocal.training.run_length import run_length
from hvdlocal.training.session import Session
from hvdlocal.training.step import TrainingStep

PERIOD = 4
"""H of the short run. The timed steps of a round lie between its first, which takes statistics, and its last."""


class Benchmark:
    """The parts that all measurements share. Building it is a collective.

    Args:
        config: model, data, optimizer and method; its islands are left out.
        communicator: the ranks.

    Attributes:
        session: data, model and settings.
        length: length of a run of the timed methods, whose base learning rate is that of one worker.
        reference_batches: divisor of the configured base learning rate for these methods.
        batches: the training batches, without an end.
        nodes: the name of every rank's node.

    Raises:
        SetupError, DisagreementError: as for `measure`.
    """

    def __init__(self, config: TrainConfig, communicator: Communicator) -> None:
        config = replace(config, method=replace(config.method, island=1, island_period=1))  # `divided` forms islands
        self.session = session = Session(config, communicator, with_test_data=False)
        timed = replace(config, method=self.method("local-ada", PERIOD))
        self.length = run_length(timed, session.loader.steps_per_epoch, communicator.size)
        self.reference_batches = session.length.reference_batches
        self.batches = session.loader.endless()
        self.nodes: list[str] = communicator.gather(node_name(), "hvdlocal.nodes")
        self._pauses = random.Random(0)
        self._divided = {1: communicator}

    def begin_together(self) -> None:
        """Returns on all ranks at the same time, after a pause that is random and equal on all of them; a collective.

        Without it, every barrier would be in phase with Horovod's cycle.
        """
        self.session.communicator.barrier("hvdlocal.measure")
        time.sleep(self._pauses.uniform(0, 0.01))

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

    def optimizer(
        self, method: MethodConfig, *, overlapped: bool = True, island: int = 1, endless: bool = False
    ) -> LocalOptimizer | SynchronousOptimizer:
        """Returns a configured optimizer with another method and a replica of its own; a collective.

        Args:
            method: such as one of `method`.
            overlapped: whether data parallelism sums gradients during the backward pass.
            island: n, the ranks of an island.
            endless: whether its rounds keep their H beyond the end of a run.
        """
        session = self.session
        length = replace(self.length, budget=sys.float_info.max) if endless else self.length
        return build_optimizer(
            replace(session.config, method=method),
            session.new_model(),
            length,
            self.divided(island),
            bucket_bytes=BUCKET_BYTES if overlapped else None,
        )

    def divided(self, island: int) -> Communicator:
        """Returns the communicator with its ranks divided into islands of so many; a collective at the first call."""
        if island not in self._divided:
            self._divided[island] = copy.copy(self.session.communicator)
            form_islands(self._divided[island], island)
        return self._divided[island]

    def method(
        self,
        preset: Preset,
        period: int,
        statistics: Literal["sketch", "exact"] | None = None,
        *,
        overlap: int = 0,
        outer: OuterConfig | None = None,
    ) -> MethodConfig:
        """Returns the configured method with another preset and a constant period.

        Args:
            preset, period: the method.
            statistics: by default as configured.
            overlap: τ.
            outer: the outer optimizer; by default none.
        """
        method = self.session.config.method
        return replace(
            method,
            preset=preset,
            period=PeriodConfig(period=period),
            statistics=statistics or method.statistics,
            smoothing=self.smoothing,
            accumulate=1 if preset.startswith("acc") else method.accumulate,
            outer=outer or OuterConfig("none"),
            overlap=overlap,
            mixing=method.mixing if overlap else None,
        )

    @staticmethod
    def parameters(optimizer: LocalOptimizer | SynchronousOptimizer) -> list[torch.nn.Parameter]:
        """Returns the parameters that an optimizer trains, in the model's order."""
        return trainable(optimizer, optimizer.model)[1]

    def synchronize_device(self) -> None:
        """Waits until a GPU has finished its work, so that a clock does not count it later."""
        if self.session.device.type == "cuda":
            torch.cuda.synchronize(self.session.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Returns the seconds that some work takes, a GPU's part included."""
        self.synchronize_device()
        start = time.perf_counter()
        work()
        self.synchronize_device()
        return time.perf_counter() - start


class StepTimer:
    """Times training's inner loop, by default with LocalAdaScale. Building it and running a round are collectives.

    Args:
        bench: the shared parts.
        preset, period, overlap: another method, as for `Benchmark.method`.
        overlapped, island: as for `Benchmark.optimizer`.

    Attributes:
        optimizer: the optimizer that trains.
        averages: moving averages of (G, σ²) after each round that gave an estimate.
        rounds: this rank's seconds of computing in each round.
    """

    def __init__(
        self,
        bench: Benchmark,
        preset: Preset = "local-ada",
        period: int = PERIOD,
        *,
        overlap: int = 0,
        overlapped: bool = True,
        island: int = 1,
    ) -> None:
        self._bench = bench
        method = bench.method(preset, period, overlap=overlap)
        self.optimizer = bench.optimizer(method, overlapped=overlapped, island=island)
        self._step = TrainingStep(bench.session, self.optimizer, self._learning_rate)
        self.averages: list[tuple[float, float]] = []
        self.rounds: list[float] = []
        self.optimizer.model.train()
        self._times: tuple[list[float], ...] = ([], [], [], [], [])

    def round(self) -> None:
        """Trains up to and including the next averaging."""
        optimizer = self.optimizer
        micro_batch, waiting, update, collect, backward = self._times
        closed, before = False, len(micro_batch)
        while not closed:
            first = not optimizer.round_under_way
            waited, forward, passed_back, stepped = self._micro_batch()
            complete = not optimizer.micro_batches
            closed = complete and not optimizer.round_under_way
            micro_batch.append(waited + forward + passed_back)
            waiting.append(waited)
            backward.append(passed_back)
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

    def _micro_batch(self) -> tuple[float, float, float, float]:
        """Trains on one micro-batch.

        Returns:
            Seconds of waiting for its samples, of the forward pass, of the backward pass, and of the optimizer's `step`.
        """
        bench = self._bench
        times = [time.perf_counter()]

        def note() -> None:
            bench.synchronize_device()
            times.append(time.perf_counter())

        batch = next(bench.batches)
        note()
        loss, _ = self._step.loss(batch)
        note()
        self._step.backward(loss)
        note()
        self._step.update()
        note()
        waited, forward, backward, stepped = (end - start for start, end in pairwise(times))
        return waited, forward, backward, stepped
