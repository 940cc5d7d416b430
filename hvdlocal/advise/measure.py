"""Measures the cost of methods on the current ranks, with the model, data and optimizer of a configuration."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

from hvdlocal.advise.benchmark import PERIOD, Benchmark, StepTimer
from hvdlocal.advise.candidates import Candidates
from hvdlocal.advise.measurements import Block, Measurements, SampleSummary, rank_jitter
from hvdlocal.averaging import NonFiniteError
from hvdlocal.communicator import Communicator
from hvdlocal.training.config import TrainConfig
from hvdlocal.training.errors import DivergedError

BLOCKS = 5
"""Number of blocks of measurements."""

RUN_SHARE = 0.6
"""Share of a block's time for the short run; the rest is for the collectives."""


def measure(config: TrainConfig, communicator: Communicator, seconds: float) -> Measurements:
    """Measures for about the given time, once the data are read. A collective.

    There are at least seven rounds of the short run and eight trials of the collectives; two and three of them are not counted.
    For methods whose learning rate is that of the whole step (sync, local), the short run uses its K·a-th part for one worker.

    Args:
        config: model, data, optimizer and method.
        communicator: the ranks.
        seconds: duration of the measurements.

    Raises:
        SetupError, DisagreementError: a run with this configuration could not start; raised on every rank.
        DivergedError: the short run ended in NaN or infinity; raised on every rank.
    """
    bench = Benchmark(config, communicator)
    try:
        return _in_blocks(bench, seconds)
    except NonFiniteError as error:
        raise DivergedError(f"while measuring: {error}") from error
    finally:
        bench.close()


def _in_blocks(bench: Benchmark, seconds: float) -> Measurements:
    start = time.monotonic()
    communicator = bench.session.communicator
    run = StepTimer(bench)
    candidates = None if communicator.size == 1 else Candidates(bench)

    def rounds(count: int) -> None:
        for _ in range(count):
            run.round()

    def trials(count: int) -> None:
        for _ in range(count):
            if candidates:
                candidates.trial()

    for _ in range(2):  # warm-up; the second pass gives a first estimate
        of_round, of_trial = _per_item(rounds, 1), _per_item(trials, 1)
    pace = run.take()
    if candidates:
        candidates.with_overlap(pace)
        of_trial = _per_item(trials, 1)
        candidates.take()
    paces, apart, taken, ends = [], [], [], []
    order = sorted(
        range(communicator.size), key=lambda rank: bench.nodes.index(bench.nodes[rank])
    )  # islands side by side
    micro_batches = PERIOD * bench.session.config.method.accumulate
    for block in range(BLOCKS):
        left = max(start + seconds - time.monotonic(), 0.0) / (BLOCKS - block)
        share = RUN_SHARE if candidates else 1.0
        begun = len(run.rounds)
        of_round = _per_item(rounds, _agreed(communicator, left * share / of_round))
        of_trial = _per_item(trials, _agreed(communicator, left * (1 - share) / of_trial))
        everyone = communicator.gather(run.take(), "hvdlocal.paces")
        paces.append(tuple(everyone[rank] for rank in order))
        apart.append(rank_jitter(communicator.gather(run.rounds[begun:], "hvdlocal.rounds"), micro_batches))
        taken.append(candidates.take() if candidates else ({}, {}, None))
        ends.append(len(run.averages))
    grad_sqr, grad_var = (
        [SampleSummary.of(estimates[begin:end]) for begin, end in pairwise([0, *ends])] for estimates in run.estimates()
    )
    return Measurements(
        accumulate=bench.session.config.method.accumulate,
        batch_size=bench.session.config.data.batch_size,
        samples=bench.session.loader.samples_per_epoch,
        epoch=bench.length.epoch,
        parameters=bench.session.parameters,
        buckets=candidates.buckets() if candidates else (),
        blocks=tuple(
            Block(of_ranks, jitter, steps, islands, sqr, var, overlap)
            for of_ranks, jitter, (steps, islands, overlap), sqr, var in zip(
                paces, apart, taken, grad_sqr, grad_var, strict=True
            )
        ),
        epochs=run.optimizer.progress / bench.length.epoch,
        seconds=max(communicator.gather(time.monotonic() - start, "hvdlocal.seconds")),
    )


def _agreed(communicator: Communicator, wish: float) -> int:
    """Returns the smallest of all ranks' wishes for a number of repetitions, at least 1. A collective."""
    return max(1, int(min(communicator.gather(wish, "hvdlocal.repeats"))))


def _per_item(work: Callable[[int], None], count: int) -> float:
    """Runs `work(count)` and returns the seconds per item."""
    start = time.perf_counter()
    work(count)
    return max(time.perf_counter() - start, 1e-6) / count
