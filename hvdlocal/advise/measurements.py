"""The results of `measure`: plain numbers, which need no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from hvdlocal.plan.overlap import BucketArrival

ROUNDING = 1e-9
"""Relative size below which a difference counts as a rounding error."""


@dataclass(frozen=True)
class SampleSummary:
    """Summary of samples that were taken one after the other.

    Attributes:
        mean: their mean; 0 without samples.
        deviation: standard deviation of one sample.
        count: number of samples.
    """

    mean: float
    deviation: float = 0.0
    count: int = 1

    @classmethod
    def of(cls, samples: Sequence[float]) -> SampleSummary:
        """Summarises samples."""
        return cls(fmean(samples) if samples else 0.0, stdev(samples) if len(samples) > 1 else 0.0, len(samples))

    @classmethod
    def pooled(cls, parts: Iterable[SampleSummary]) -> SampleSummary:
        """Combines several summaries; the deviation is the one within the parts, so that a slow drift does not count."""
        parts = [part for part in parts if part.count]
        count = sum(part.count for part in parts)
        if not count:
            return cls(0.0, count=0)
        variance = sum(part.deviation**2 * part.count for part in parts) / count
        return cls(sum(part.mean * part.count for part in parts) / count, math.sqrt(variance), count)


@dataclass(frozen=True)
class StepTimes:
    """Seconds that one rank spends between averagings.

    Attributes:
        micro_batch: the forward and backward pass, including the wait for the samples.
        waiting: the wait for the samples alone.
        update: the update of a local step.
        collect: accumulating a micro-batch that does not complete a local step; no samples without accumulation.
        backward: the backward pass alone.
    """

    micro_batch: SampleSummary
    waiting: SampleSummary
    update: SampleSummary
    collect: SampleSummary
    backward: SampleSummary


@dataclass(frozen=True)
class SyncStepTimes:
    """Seconds of a step that ends in a collective which all ranks begin at the same time, on the slowest rank.

    Attributes:
        bytes: bytes that a rank contributes to the collectives of the step.
        step: the whole step: the method's computations on the gradient, the collective, and the update. Where sums overlap with
            the backward pass, the time of both beyond that of a backward pass alone.
        collective: the collective alone; no samples where it overlaps with the backward pass.
        collect: accumulating a micro-batch that does not complete the step; no samples without accumulation.
    """

    bytes: int
    step: SampleSummary
    collective: SampleSummary
    collect: SampleSummary


@dataclass(frozen=True)
class IslandTimes:
    """Seconds of the collectives of islands of n ranks, which all ranks begin at the same time, on the slowest rank.

    Attributes:
        latency: the sum of one number inside of the islands; no samples for islands of one rank.
        gradient: the sum of the gradient inside of the islands; no samples for islands of one rank.
        average: the average of the model and its statistics across the islands, by slices; no samples for one island of all.
    """

    latency: SampleSummary
    gradient: SampleSummary
    average: SampleSummary


@dataclass(frozen=True)
class OverlapTimes:
    """Seconds of steps beside an average that all ranks begin at the same time, on the slowest rank.

    Attributes:
        overlap: τ, the number of such steps.
        beyond: what they take beyond as many steps alone: they are slower, wait for what is left of the average, and apply it.
        own_work: what the step that begins an average takes beyond an update.
    """

    overlap: int
    beyond: SampleSummary
    own_work: SampleSummary


@dataclass(frozen=True)
class Block:
    """An interval of time in which everything was measured.

    Attributes:
        paces: the times of each rank; the ranks of a node side by side.
        apart: the variation of a micro-batch's seconds that ranks do not share; see `rank_jitter`.
        closings: the times of steps with a collective, by method, local-ada's with its statistics ("local-ada sketch"), and data
            parallelism's with and without overlap ("acc-ada", "acc-ada overlapped"), and that of the model with an outer
            optimizer, where there can be one ("local-lin outer"); empty on one rank.
        islands: the times of collectives by n, the ranks of an island, from 1 to all; empty on one rank.
        grad_sqr, grad_var: single estimates of G and σ², clamped but not smoothed; no samples on one rank.
        overlap: the times of steps beside an average; None on one rank.
    """

    paces: tuple[StepTimes, ...]
    apart: SampleSummary
    closings: Mapping[str, SyncStepTimes]
    islands: Mapping[int, IslandTimes]
    grad_sqr: SampleSummary
    grad_var: SampleSummary
    overlap: OverlapTimes | None


@dataclass(frozen=True)
class Measurements:
    """All measurements, equal on every rank.

    Attributes:
        accumulate: a, the micro-batches of a local step.
        batch_size: B.
        samples: number of training samples of an epoch.
        epoch: N / B, the micro-batches of an epoch for one worker.
        parameters: number of trainable parameters.
        buckets: the parts in which an overlapped sum takes the gradient; empty on one rank.
        blocks: consecutive blocks. The load of nodes and network varies from minute to minute; the differences between blocks
            show how accurate the measurements are.
        epochs: scale-invariant epochs that the short run covered, from the start of training.
        seconds: duration of all measurements.
    """

    accumulate: int
    batch_size: int
    samples: int
    epoch: float
    parameters: int
    buckets: tuple[BucketArrival, ...]
    blocks: tuple[Block, ...]
    epochs: float
    seconds: float

    @property
    def num_workers(self) -> int:
        """K."""
        return len(self.blocks[0].paces)


def rank_jitter(rounds: Sequence[Sequence[float]], micro_batches: int) -> SampleSummary:
    """Estimates the jitter of a micro-batch's time on one rank, without variation common to all ranks, which causes no waiting.

    Args:
        rounds: seconds of computing of each rank in each round; the same rounds for all ranks.
        micro_batches: number of micro-batches of a round.

    Returns:
        The deviation from an additive model of rank and round, with mean 0; no samples for one rank or one round.
    """
    ranks, count = len(rounds), len(rounds[0])
    if ranks < 2 or count < 2:
        return SampleSummary.of([])
    of_round = [fmean(one) for one in zip(*rounds, strict=True)]
    whole = fmean(of_round)
    squares = sum(
        (seconds - fmean(rank) - of_round[i] + whole) ** 2 for rank in rounds for i, seconds in enumerate(rank)
    )
    return SampleSummary(0.0, math.sqrt(squares / ((ranks - 1) * (count - 1)) / micro_batches), count - 1)


def undo_moving_average(averages: Sequence[float], theta: float) -> list[float]:
    """Recovers the values of which a debiased moving average was made; rounding errors are replaced by 0.

    Args:
        averages: the average after each update, beginning with the first.
        theta: θ, the share that each update keeps; below 1.
    """
    found, weighted, weight = [], 0.0, 0.0
    for average in averages:
        after = theta * weight + 1 - theta
        one = (average * after - theta * weighted) / (1 - theta)
        found.append(one if abs(one) > ROUNDING * abs(average) else 0.0)
        weighted, weight = average * after, after
    return found
