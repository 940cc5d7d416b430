"""The inputs of a prediction: what steps, collectives and islands cost in seconds, and what follows directly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hvdlocal.plan.overlap import BucketArrival, SumTime, exposed_seconds

MARGIN = 1.2
"""Time of the steps that shall hide an average, over the time of the average alone."""


@dataclass(frozen=True)
class Cost:
    """Seconds that a method spends in addition to the micro-batches.

    Attributes:
        closing: a step with its collective; what it takes beyond the backward pass.
        update: a step without a collective.
        collect: accumulating a micro-batch that does not complete a step.
        collective: the part of `closing` that is the collective; 0 where it overlaps with the backward pass.
    """

    closing: float
    update: float = 0.0
    collect: float = 0.0
    collective: float = 0.0


@dataclass(frozen=True)
class IslandCost:
    """Seconds that the collectives of islands of n ranks take.

    Attributes:
        sum: the time of a sum inside of an island, by its length.
        average: the average across the islands, by slices.
    """

    sum: SumTime
    average: float


@dataclass(frozen=True)
class OverlapCost:
    """What becomes of an average's time when it goes on behind steps.

    Attributes:
        gained: share of the hidden time by which a round is shorter. It is below 1 if steps beside an average are slower than
            alone, or the average is.
        own_work: seconds of copying what is sent and of carrying steps over, beyond the work of an average that is waited for.
    """

    gained: float
    own_work: float = 0.0


@dataclass(frozen=True)
class CostModel:
    """The inputs of a prediction.

    Attributes:
        micro_batch: mean seconds of the forward pass, backward pass and loading of one micro-batch, for each rank.
        costs: the costs by method.
        grad_sqr, grad_var: G and σ².
        variation: standard deviation of a micro-batch's seconds that ranks do not share, relative to the mean.
        accumulate: a, micro-batches of a local step.
        c: weight of the local steps' bias in the gain.
        epoch: N / B, micro-batches of one worker in an epoch.
        islands: the costs of islands by n, the ranks of one, from 1 to all; empty if they are not known.
        backward: seconds of a backward pass on the slowest rank.
        buckets: the parts in which an overlapped sum takes the gradient.
        overlap: the cost of averages behind steps; None if it is not known.
        outer: seconds that an outer optimizer adds to an average, a difference that noise may make negative; None if there can
            be none.
    """

    micro_batch: tuple[float, ...]
    costs: Mapping[str, Cost]
    grad_sqr: float
    grad_var: float
    variation: float = 0.0
    accumulate: int = 1
    c: float = 1.0
    epoch: float = 1.0
    islands: Mapping[int, IslandCost] = field(default_factory=dict)
    backward: float = 0.0
    buckets: Sequence[BucketArrival] = ()
    overlap: OverlapCost | None = None
    outer: float | None = None

    @property
    def num_workers(self) -> int:
        """K, without islands."""
        return len(self.micro_batch)

    @property
    def island_sizes(self) -> list[int]:
        """The n with which the islands are workers that take local steps: 1 and those of which there are several."""
        return [1, *(n for n in self.islands if 1 < n < self.num_workers)]

    def exposed(self, island: int) -> float:
        """Returns the seconds by which the sum of a gradient over the n ranks of an island outlasts the backward pass."""
        return exposed_seconds(self.backward, self.buckets, self.islands[island].sum)


def mean_gradient(cost_model: CostModel, island: int) -> float:
    """Returns the seconds that the mean gradient of an island adds to a step: what is exposed of its sum, and its own work."""
    serial = cost_model.costs["acc-lin"]
    own_work = max(serial.closing - serial.collective - serial.update, 0.0)
    return cost_model.exposed(island) + own_work


def predicted_overlap(cost_model: CostModel, method: str) -> float:
    """Returns the closing seconds of data parallelism with overlap, from those without: all ranks are one island.

    Args:
        cost_model: the measured costs.
        method: sync, acc-lin or acc-ada.
    """
    serial = cost_model.costs[method]
    return serial.closing - serial.collective + cost_model.exposed(cost_model.num_workers)


def exposed_share(cost_model: CostModel, m: float) -> float:
    """Returns what an overlapped sum adds to a local step, in units of one, on a network on which the whole sum takes m."""
    num_bytes = sum(bucket.bytes for bucket in cost_model.buckets)
    step = cost_model.accumulate * max(cost_model.micro_batch) + cost_model.costs["local-lin"].update
    return exposed_seconds(cost_model.backward / step, cost_model.buckets, SumTime(0.0, m / num_bytes))


def noise(cost_model: CostModel) -> float:
    """Returns σ²/G."""
    return cost_model.grad_var / cost_model.grad_sqr if cost_model.grad_sqr else math.inf


def averaging_seconds(cost_model: CostModel, method: str, island: int = 1) -> float:
    """Returns the seconds that a local step with the average takes beyond one without, with islands of n ranks."""
    cost = cost_model.costs[method]
    change = cost_model.islands[island].average - cost_model.islands[1].average if island > 1 else 0.0
    return max(cost.closing - cost.update + change, 0.0)


def step_seconds(cost_model: CostModel, method: str) -> float:
    """Returns the seconds of a step without a collective, on the slowest rank; of data parallelism without what it collects."""
    cost, accumulate = cost_model.costs[method], cost_model.accumulate
    collect = (accumulate - 1) * cost.collect if method.startswith("local") else 0.0
    return accumulate * max(cost_model.micro_batch) + cost.update + collect


def averaging_ratio(cost_model: CostModel, method: str) -> float:
    """Returns m: the additional time of a step with a collective, relative to a local step without one."""
    return averaging_seconds(cost_model, method) / step_seconds(cost_model, method)


def least_overlap(collective: float, step: float) -> int:
    """Returns the least τ with which an average is free, with a margin, and at least 1.

    Args:
        collective: seconds of the average alone.
        step: seconds of a local step.
    """
    return max(math.ceil(MARGIN * collective / step), 1)


def overlap_saving(cost_model: CostModel, method: str, steps: int, island: int = 1) -> float:
    """Returns the seconds by which a round is shorter if its average is under way during steps of the next one.

    Args:
        cost_model: the measured costs, with that of overlap.
        method: a method with local steps.
        steps: τ, but no more than H.
        island: n, the ranks of an island.
    """
    assert cost_model.overlap is not None
    change = cost_model.islands[island].average - cost_model.islands[1].average if island > 1 else 0.0
    collective = max(cost_model.costs[method].collective + change, 0.0)
    hidden = min(collective, steps * step_seconds(cost_model, method))
    return cost_model.overlap.gained * hidden - cost_model.overlap.own_work
