"""What `measure` finds out about a configuration on the ranks at hand. Plain numbers; needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

ROUNDING = 1e-9


@dataclass(frozen=True)
class SampleSummary:
    """Samples taken one after the other.

    Attributes:
        mean: 0 without any.
        deviation: standard deviation of one sample.
        count: how many.
    """

    mean: float
    deviation: float = 0.0
    count: int = 1

    @classmethod
    def of(cls, samples: Sequence[float]) -> SampleSummary:
        """Their summary."""
        return cls(fmean(samples) if samples else 0.0, stdev(samples) if len(samples) > 1 else 0.0, len(samples))

    @classmethod
    def pooled(cls, parts: Iterable[SampleSummary]) -> SampleSummary:
        """The summary of several; the deviation is that within them, so that a slow drift is none."""
        parts = [part for part in parts if part.count]
        count = sum(part.count for part in parts)
        if not count:
            return cls(0.0, count=0)
        variance = sum(part.deviation**2 * part.count for part in parts) / count
        return cls(sum(part.mean * part.count for part in parts) / count, math.sqrt(variance), count)


@dataclass(frozen=True)
class StepTimes:
    """What one rank takes between averagings, in seconds.

    Attributes:
        micro_batch: forward and backward pass, and waiting for the images.
        waiting: the part spent in waiting for the images.
        update: a local step's update.
        collect: taking in a micro-batch that does not complete a local step; no samples without accumulation.
    """

    micro_batch: SampleSummary
    waiting: SampleSummary
    update: SampleSummary
    collect: SampleSummary


@dataclass(frozen=True)
class SyncStepTimes:
    """A step that ends in a collective, every rank having come to it at the same time. Of each, the slowest rank's seconds.

    Attributes:
        bytes: that a rank hands to collectives in it.
        step: all of it: what the method computes of the gradient, the collective, the update.
        collective: the collective alone.
        collect: taking in a micro-batch that does not complete the step; no samples without accumulation.
    """

    bytes: int
    step: SampleSummary
    collective: SampleSummary
    collect: SampleSummary


@dataclass(frozen=True)
class Block:
    """A stretch of time in which everything was measured.

    Attributes:
        paces: of each rank.
        apart: of a micro-batch's seconds, what ranks do not share; see `unshared`.
        closings: by the name of the method, local-ada's with its statistics ("local-ada sketch"); none on one rank.
        grad_sqr, grad_var: single estimates of G and σ², clamped but not smoothed; no samples on one rank.
    """

    paces: tuple[StepTimes, ...]
    apart: SampleSummary
    closings: Mapping[str, SyncStepTimes]
    grad_sqr: SampleSummary
    grad_var: SampleSummary


@dataclass(frozen=True)
class Measurements:
    """All of it. The same on every rank.

    Attributes:
        accumulate: a, micro-batches of a local step.
        batch_size: B.
        samples: training images of an epoch.
        epoch: N / B, the micro-batches of one worker that make an epoch.
        parameters: trainable ones.
        blocks: one after the other. Load and network have good and bad minutes; how much blocks differ tells how well anything
            is known.
        epochs: scale-invariant epochs that the short run went through, from the start of training.
        seconds: that everything took.
    """

    accumulate: int
    batch_size: int
    samples: int
    epoch: float
    parameters: int
    blocks: tuple[Block, ...]
    epochs: float
    seconds: float

    @property
    def num_workers(self) -> int:
        """K."""
        return len(self.blocks[0].paces)


def rank_jitter(rounds: Sequence[Sequence[float]], micro_batches: int) -> SampleSummary:
    """How much a micro-batch's seconds vary on one rank beyond what they do on all: nobody waits for what slows down all alike.

    Args:
        rounds: seconds of computing of each rank in each round, the same rounds for all.
        micro_batches: of a round.

    Returns:
        Deviations from what rank and round explain, with mean 0; no samples with one rank or one round.
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
    """What a debiased moving average was made of; rounding errors in place of 0 are 0 again.

    Args:
        averages: its value after each update, from the first.
        theta: θ, the share that each update keeps; below 1.
    """
    found, weighted, weight = [], 0.0, 0.0
    for average in averages:
        after = theta * weight + 1 - theta
        one = (average * after - theta * weighted) / (1 - theta)
        found.append(one if abs(one) > ROUNDING * abs(average) else 0.0)
        weighted, weight = average * after, after
    return found
