"""Summaries over the ranks. All of them are collectives."""

from __future__ import annotations

from collections.abc import Sequence

from hvdlocal.advise.measurements import SampleSummary
from hvdlocal.communicator import Communicator


def slowest_rank(communicator: Communicator, samples: Sequence[tuple[float, ...]]) -> list[list[float]]:
    """Returns, for each of the times in a sample, the longest of all ranks in every trial."""
    everyone = communicator.gather(samples, "hvdlocal.samples")
    slowest = [tuple(map(max, zip(*ranks, strict=True))) for ranks in zip(*everyone, strict=True)]
    return [list(times) for times in zip(*slowest, strict=True)]


def slowest_mean(communicator: Communicator, samples: Sequence[float]) -> SampleSummary:
    """Returns the summary of the rank with the longest mean."""
    return max(communicator.gather(SampleSummary.of(samples), "hvdlocal.collect"), key=lambda one: one.mean)
