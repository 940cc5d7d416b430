"""Predicts the seconds for an epoch of progress, by method and H, from the times of steps and collectives.

Every method makes rounds: n micro-batches in s optimizer steps, the last of which ends in a collective. Data parallelism has
s = 1 (sync: n = a, acc-*: n = H·a), Local SGD has s = H and n = H·a. A round takes

    n · t + (n − s) · collect + (s − 1) · update + closing,

where t is the time of a micro-batch on the slowest rank; with t and the averaging alone, this is Eq. 16 of Balles et al. A round
makes s · ρ scale-invariant iterations of progress, with ρ from Eqs. 14 and 49 (Eq. 21 for accumulation instead of local steps).

Methods with fixed rules (sync, acc-lin, local-lin) assume a progress of K·n iterations. For a fair comparison, every method is
credited with the progress that the gradient statistics justify.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hvdlocal.averaging.gain import gain_ratio
from hvdlocal.plan.crossover import crossovers

PERIODS: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
"""The values of H that are compared."""

CERTAIN = 2.0
"""Number of standard errors by which two times must differ before one of them is called shorter."""


@dataclass(frozen=True)
class Cost:
    """Seconds that a method spends in addition to the micro-batches.

    Attributes:
        closing: a step with its collective.
        update: a step without a collective.
        collect: accumulating a micro-batch that does not complete a step.
    """

    closing: float
    update: float = 0.0
    collect: float = 0.0


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
    """

    micro_batch: tuple[float, ...]
    costs: Mapping[str, Cost]
    grad_sqr: float
    grad_var: float
    variation: float = 0.0
    accumulate: int = 1
    c: float = 1.0
    epoch: float = 1.0

    @property
    def num_workers(self) -> int:
        """K."""
        return len(self.micro_batch)


@dataclass(frozen=True)
class Prediction:
    """The predicted times of a method with a period. For acc-* the period is the number of micro-batches of a step, over a.

    Attributes:
        method, period: the method and its period.
        gain: the factor that the method applies to the base rate, and the iterations of progress that it counts per step.
        justified: the gain by Eq. 49.
        round: seconds between the ends of two collectives.
        own_epoch: seconds of an epoch as the method counts it; for fixed rules, an epoch of data.
        epoch: seconds of an epoch of progress at the justified gain.
    """

    method: str
    period: int
    gain: float
    justified: float
    round: float
    own_epoch: float
    epoch: float


def predict(cost_model: CostModel, method: str, period: int) -> Prediction:
    """Predicts the times of one method with one period.

    Args:
        cost_model: the measured costs.
        method: one of `cost_model.costs`: sync, acc-lin, acc-ada, local-lin, local-ada, local-ada-nostale.
        period: H; 1 with sync.
    """
    local = method.startswith("local")
    workers, accumulate = cost_model.num_workers, cost_model.accumulate
    steps = period if local else 1
    micro_batches = period * accumulate
    grad_sqr, grad_var = cost_model.grad_sqr, cost_model.grad_var
    per_step = micro_batches // steps
    justified = gain_ratio(grad_sqr, grad_var, workers, steps, cost_model.c, accumulate=per_step)
    gain = justified if "ada" in method else float(workers * per_step)
    cost = cost_model.costs[method]
    round_seconds = (
        slowest(cost_model.micro_batch, cost_model.variation, micro_batches)
        + (micro_batches - steps) * cost.collect
        + (steps - 1) * cost.update
        + cost.closing
    )
    per_unit = round_seconds * cost_model.epoch / steps
    return Prediction(method, period, gain, justified, round_seconds, per_unit / gain, per_unit / justified)


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


@lru_cache(maxsize=1)
def _draws(ranks: int) -> np.ndarray:
    draws = np.random.Generator(np.random.Philox(0)).standard_normal((512, ranks))
    return draws - draws.mean(0)  # a single rank does not wait


@dataclass(frozen=True)
class Comparison:
    """Local SGD at its best period against data parallelism at its best.

    Attributes:
        local: the best prediction for local-ada (or local-ada-nostale, if it has a cost) with H > 1; H = 1 is data parallelism.
        data_parallel: the best prediction for sync and acc-ada.
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
    adaptive = "local-ada-nostale" if "local-ada-nostale" in cost_model.costs else "local-ada"
    local = [predict(cost_model, adaptive, period) for period in periods if period > 1]
    parallel = [predict(cost_model, "sync", 1), *(predict(cost_model, "acc-ada", period) for period in periods)]
    best_local, best_parallel = (min(some, key=lambda one: one.epoch) for some in (local, parallel))
    return Comparison(best_local, best_parallel, best_local.epoch / best_parallel.epoch)


def crossover(
    noise: float, num_workers: int, accumulate: int = 1, c: float = 1.0, periods: Sequence[int] = PERIODS
) -> float | None:
    """Returns the m from which local-ada at its best H > 1 is faster than acc-ada at its best, by Eqs. 16 and 49 alone.

    Args:
        noise: σ²/G.
        num_workers: K.
        accumulate: a.
        c: weight of the local steps' bias in the gain.
        periods: the values of H to choose from.

    Returns:
        The m; None if local-ada is never faster.
    """
    grad_sqr, grad_var = (1.0, noise) if math.isfinite(noise) else (0.0, 1.0)

    def epochs(period: int, local: bool) -> float:
        steps, per_step = (period, accumulate) if local else (1, period * accumulate)
        return period / steps / gain_ratio(grad_sqr, grad_var, num_workers, steps, c, accumulate=per_step)

    accumulated = {period: epochs(period, local=False) for period in periods}
    local = {period: epochs(period, local=True) for period in periods if period > 1}
    return next(iter(crossovers(accumulated, local)), None)


def noise(cost_model: CostModel) -> float:
    """Returns σ²/G."""
    return cost_model.grad_var / cost_model.grad_sqr if cost_model.grad_sqr else math.inf


def averaging_ratio(cost_model: CostModel, method: str) -> float:
    """Returns m: the additional time of a step with a collective, relative to a local step without one."""
    cost, accumulate = cost_model.costs[method], cost_model.accumulate
    step = accumulate * max(cost_model.micro_batch) + cost.update
    if method.startswith("local"):
        step += (accumulate - 1) * cost.collect
    return max(cost.closing - cost.update, 0.0) / step
