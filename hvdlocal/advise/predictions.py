"""Predicts the seconds for an epoch of progress, by method and H, from the times of steps and collectives.

Every method makes rounds: n micro-batches in s optimizer steps, the last of which ends in a collective. Data parallelism has
s = 1 (sync: n = a, acc-*: n = H·a), Local SGD has s = H and n = H·a. A round takes

    n · t + (n − s) · collect + (s − 1) · update + closing,

where t is the time of a micro-batch on the slowest rank; with t and the averaging alone, this is Eq. 16 of Balles et al. A round
makes s · ρ scale-invariant iterations of progress, with ρ from Eqs. 14 and 49 (Eq. 21 for accumulation instead of local steps).

With islands of n ranks each of the s steps also sums the gradient inside of the island, of which the backward pass hides a part
(`hvdlocal.plan.overlap`), the average goes across the islands, and a step stands for n · a micro-batches of one of K/n workers.

Methods with fixed rules (sync, acc-lin, local-lin) assume a progress of K·n iterations. For a fair comparison, every method is
credited with the progress that the gradient statistics justify.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from hvdlocal.averaging.gain import gain_ratio
from hvdlocal.plan.crossover import skyline
from hvdlocal.plan.overlap import BucketArrival, SumTime, exposed_seconds

PERIODS: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
"""The values of H that are compared."""

CERTAIN = 2.0
"""Number of standard errors by which two times must differ before one of them is called shorter."""


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


@dataclass(frozen=True)
class Prediction:
    """The predicted times of a method with a period. For acc-* the period is the number of micro-batches of a step, over a.

    Attributes:
        method, period: the method and its period.
        island: n, the ranks of an island; 1 without islands.
        gain: the factor that the method applies to the base rate, and the iterations of progress that it counts per step.
        justified: the gain by Eq. 49.
        round: seconds between the ends of two collectives.
        own_epoch: seconds of an epoch as the method counts it; for fixed rules, an epoch of data.
        epoch: seconds of an epoch of progress at the justified gain.
    """

    method: str
    period: int
    island: int
    gain: float
    justified: float
    round: float
    own_epoch: float
    epoch: float


def predict(cost_model: CostModel, method: str, period: int, island: int = 1) -> Prediction:
    """Predicts the times of one method with one period.

    Args:
        cost_model: the measured costs.
        method: one of `cost_model.costs`: sync, acc-lin, acc-ada, each also with "overlapped", local-lin, local-ada,
            local-ada-nostale.
        period: H; 1 with sync.
        island: n, one of `cost_model.island_sizes`; 1 with data parallelism.
    """
    local = method.startswith("local")
    workers, accumulate = cost_model.num_workers, cost_model.accumulate
    steps = period if local else 1
    micro_batches = period * accumulate
    grad_sqr, grad_var = cost_model.grad_sqr, cost_model.grad_var
    per_step = micro_batches // steps
    justified = gain_ratio(grad_sqr, grad_var, workers // island, steps, cost_model.c, accumulate=island * per_step)
    gain = justified if "ada" in method else float(workers * per_step)
    cost = cost_model.costs[method]
    round_seconds = (micro_batches - steps) * cost.collect + (steps - 1) * cost.update + cost.closing
    if island == 1:
        round_seconds += slowest(cost_model.micro_batch, cost_model.variation, micro_batches)
    else:
        round_seconds += slowest_island(cost_model.micro_batch, cost_model.variation, steps, per_step, island)
        round_seconds += steps * mean_gradient(cost_model, island)
        round_seconds += cost_model.islands[island].average - cost_model.islands[1].average
    per_unit = round_seconds * cost_model.epoch / steps
    return Prediction(method, period, island, gain, justified, round_seconds, per_unit / gain, per_unit / justified)


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


def slowest(means: Sequence[float], variation: float, count: int) -> float:
    """Returns the expected seconds of a number of micro-batches on the rank that takes longest: E max_k Σ t_k.

    Sums of times are modelled as normal, and the expectation is a mean over a few hundred draws, always the same. (The straggler
    model of benchmarks/scaling.py is another one: log-normal times with one mean, for thousands of workers.)

    Args:
        means: mean seconds of one micro-batch on each rank.
        variation: standard deviation relative to the mean; independent from one micro-batch to the next.
        count: number of micro-batches between two collectives.
    """
    mean = np.asarray(means)
    sums = count * mean + math.sqrt(count) * variation * mean * _draws(len(mean))
    return float(sums.max(1).mean())


def slowest_island(means: Sequence[float], variation: float, steps: int, per_step: int, island: int) -> float:
    """Returns the expected seconds of steps at which the ranks of an island wait for one another, until the last island is done.

    Args:
        means, variation: as for `slowest`, with the ranks of an island side by side.
        steps: number of steps between two collectives of all ranks.
        per_step: micro-batches of a step.
        island: n.
    """
    mean = np.asarray(means)
    step = per_step * mean + math.sqrt(per_step) * variation * mean * _draws(len(mean))
    of_island = step.reshape(len(step), -1, island).max(2)
    sums = steps * of_island.mean(0) + math.sqrt(steps) * of_island.std(0) * _draws(of_island.shape[1])
    return float(sums.max(1).mean())


@lru_cache(maxsize=8)
def _draws(ranks: int) -> np.ndarray:
    draws = np.random.Generator(np.random.Philox(0)).standard_normal((512, ranks))
    return draws - draws.mean(0)  # a single rank does not wait


@dataclass(frozen=True)
class Comparison:
    """Local SGD at its best period against data parallelism at its best.

    Attributes:
        local: the best prediction for local-ada (or local-ada-nostale, if it has a cost) with H > 1, with islands or without;
            H = 1 is data parallelism.
        data_parallel: the best prediction for sync and acc-ada, with overlap or without.
        ratio: time of `local` over time of `data_parallel`.
        error: standard error of the ratio.
    """

    local: Prediction
    data_parallel: Prediction
    ratio: float
    error: float = 0.0

    @property
    def verdict(self) -> str:
        """The faster method, "local" or "data-parallel"; "undecided" if the difference is within the noise."""
        if abs(self.ratio - 1) <= CERTAIN * self.error:
            return "undecided"
        return "local" if self.ratio < 1 else "data-parallel"


def compare_methods(cost_model: CostModel, periods: Sequence[int] = PERIODS) -> Comparison:
    """Compares the methods at equal progress."""
    local = [best_period(cost_model, island, periods) for island in cost_model.island_sizes]
    parallel = [predict(cost_model, method, 1) for method in cost_model.costs if method.startswith("sync")]
    parallel += [
        predict(cost_model, method, period)
        for method in cost_model.costs
        if method.startswith("acc-ada")
        for period in periods
    ]
    best_local, best_parallel = (min(some, key=lambda one: one.epoch) for some in (local, parallel))
    return Comparison(best_local, best_parallel, best_local.epoch / best_parallel.epoch)


def best_period(cost_model: CostModel, island: int = 1, periods: Sequence[int] = PERIODS) -> Prediction:
    """Returns the prediction for local-ada (or local-ada-nostale) at its best H > 1, with islands of n ranks."""
    method = "local-ada-nostale" if "local-ada-nostale" in cost_model.costs else "local-ada"
    found = (predict(cost_model, method, period, island) for period in periods if period > 1)
    return min(found, key=lambda one: one.epoch)


def crossover(
    noise: float,
    num_workers: int,
    accumulate: int = 1,
    c: float = 1.0,
    periods: Sequence[int] = PERIODS,
    exposed: Callable[[float], float] = lambda m: m,
) -> float | None:
    """Returns the m from which local-ada at its best H > 1 is faster than acc-ada at its best, by Eqs. 16 and 49 alone.

    Args:
        noise: σ²/G.
        num_workers: K.
        accumulate: a.
        c: weight of the local steps' bias in the gain.
        periods: the values of H to choose from.
        exposed: what data parallelism adds to a step, in units of a local step, as a function of m; all of m without overlap.

    Returns:
        The m, at most 10,000; None if local-ada is never faster.
    """
    grad_sqr, grad_var = (1.0, noise) if math.isfinite(noise) else (0.0, 1.0)

    def epochs(period: int, local: bool) -> float:
        steps, per_step = (period, accumulate) if local else (1, period * accumulate)
        return period / steps / gain_ratio(grad_sqr, grad_var, num_workers, steps, c, accumulate=per_step)

    accumulated = {period: epochs(period, local=False) for period in periods}
    local = {period: epochs(period, local=True) for period in periods if period > 1}

    def saved(m: float) -> float:
        beyond = exposed(m)
        return min(n * (1 + beyond / h) for h, n in accumulated.items()) - skyline(local, 1, m)

    grid = np.geomspace(1e-3, 1e4, 500).tolist()
    high = next((m for m in grid if saved(m) > 0), None)
    if high is None:
        return None
    low = high / (grid[1] / grid[0]) if high > grid[0] else 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if saved(middle) > 0 else (middle, high)
    return high


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


def averaging_ratio(cost_model: CostModel, method: str) -> float:
    """Returns m: the additional time of a step with a collective, relative to a local step without one."""
    cost, accumulate = cost_model.costs[method], cost_model.accumulate
    step = accumulate * max(cost_model.micro_batch) + cost.update
    if method.startswith("local"):
        step += (accumulate - 1) * cost.collect
    return averaging_seconds(cost_model, method) / step
