"""Predicts the seconds for an epoch of progress, by method and H, from the times of steps and collectives.

Every method makes rounds: q micro-batches in s optimizer steps, the last of which ends in a collective. Data parallelism has
s = 1 (sync: q = a, acc-*: q = H·a), Local SGD has s = H and q = H·a. A round takes

    q · t + (q − s) · collect + (s − 1) · update + closing,

where t is the time of a micro-batch on the slowest rank; with t and the averaging alone, this is Eq. 16 of Balles et al. A round
makes s · ρ scale-invariant iterations of progress, with ρ from Eqs. 14 and 49 (Eq. 21 for accumulation instead of local steps).

With islands of n ranks each of the s steps also sums the gradient inside of the island, of which the backward pass hides a part
(`hvdlocal.plan.overlap`), the average goes across the islands, and a step stands for n · a micro-batches of one of K/n workers.

With an overlap of τ steps, the next round's first τ steps, or all of them, hide that part of the average which they last, and a
measured share of it is gained.

Methods with fixed rules (sync, acc-lin, local-lin) assume a progress of K·q iterations. For a fair comparison, every method is
credited with the progress that the gradient statistics justify.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hvdlocal.advise.cost_model import CostModel, mean_gradient, overlap_saving
from hvdlocal.averaging.gain import gain_ratio

PERIODS: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
"""The values of H that are compared."""


@dataclass(frozen=True)
class Prediction:
    """The predicted times of a method with a period. For acc-* the period is the number of micro-batches of a step, over a.

    Attributes:
        method, period: the method and its period.
        island: n, the ranks of an island; 1 without islands.
        overlap: τ, the steps of the next round during which an average is under way; 0 without overlap.
        gain: the factor that the method applies to the base rate, and the iterations of progress that it counts per step.
        justified: the gain by Eq. 49.
        round: seconds between the ends of two collectives.
        own_epoch: seconds of an epoch as the method counts it; for fixed rules, an epoch of data.
        epoch: seconds of an epoch of progress at the justified gain.
    """

    method: str
    period: int
    island: int
    overlap: int
    gain: float
    justified: float
    round: float
    own_epoch: float
    epoch: float


def predict(cost_model: CostModel, method: str, period: int, island: int = 1, overlap: int = 0) -> Prediction:
    """Predicts the times of one method with one period.

    Args:
        cost_model: the measured costs.
        method: one of `cost_model.costs`: sync, acc-lin, acc-ada, each also with "overlapped", local-lin, local-ada,
            local-ada-nostale.
        period: H; 1 with sync.
        island: n, one of `cost_model.island_sizes`; 1 with data parallelism.
        overlap: τ; 0 with data parallelism.
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
    if overlap:
        round_seconds -= overlap_saving(cost_model, method, min(overlap, period), island)
    per_unit = round_seconds * cost_model.epoch / steps
    own_epoch, epoch = per_unit / gain, per_unit / justified
    return Prediction(method, period, island, overlap, gain, justified, round_seconds, own_epoch, epoch)


def repeated(one: Prediction, cost_model: CostModel) -> Prediction:
    """Returns the prediction for the same method and period from another cost model."""
    return predict(cost_model, one.method, one.period, one.island, one.overlap)


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
