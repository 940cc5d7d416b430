"""Compares Local SGD with data parallelism, each at its best period."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hvdlocal.advise.cost_model import CostModel
from hvdlocal.advise.predictions import PERIODS, Prediction, predict
from hvdlocal.averaging.gain import gain_ratio
from hvdlocal.plan.crossover import skyline

CERTAIN = 2.0
"""Number of standard errors by which two times must differ before one of them is called shorter."""


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
