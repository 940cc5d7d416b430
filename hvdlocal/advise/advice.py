"""Recommends a method and an H: predictions from measurements, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean

import numpy as np

from hvdlocal.advise.comparison import Comparison, best_period, compare_methods, crossover
from hvdlocal.advise.cost_model import (
    Cost,
    CostModel,
    IslandCost,
    OverlapCost,
    averaging_ratio,
    exposed_share,
    noise,
    step_seconds,
)
from hvdlocal.advise.measurements import Block, Measurements, SampleSummary, StepTimes
from hvdlocal.advise.overlap import OverlapComparison, compare_overlap
from hvdlocal.advise.predictions import PERIODS, Prediction, predict, repeated
from hvdlocal.plan.overlap import SumTime


@dataclass(frozen=True)
class Estimate:
    """A cost model from all blocks of measurements, and the jackknife's models, each without one of the blocks.

    Attributes:
        cost_model: the model from all blocks.
        without: the models without the first block, without the second …; empty if errors are not known.
    """

    cost_model: CostModel
    without: Sequence[CostModel] = field(default_factory=tuple)

    def error(self, value: Callable[[CostModel], float]) -> float:
        """Returns the standard error of a value that is computed from a cost model (Efron and Stein, 1981).

        The error accounts for load and network affecting all measurements of a block together.
        """
        values = [value(cost_model) for cost_model in self.without]
        return float(np.std(values)) * math.sqrt(len(values) - 1) if values else 0.0

    def ratio_error(self, one: Prediction, other: Prediction) -> float:
        """Returns the standard error of `one.epoch / other.epoch`."""
        return self.error(lambda given: repeated(one, given).epoch / repeated(other, given).epoch)


def estimate(measured: Measurements, c: float, statistics: str) -> Estimate:
    """Converts measurements to a cost model with errors.

    Args:
        measured: the measurements, on two ranks or more.
        c: weight of the local steps' bias in the gain.
        statistics: the statistics that local-ada would send, "sketch" or "exact".
    """
    blocks = measured.blocks
    names = {"sync": "acc-lin", "acc-lin": "acc-lin", "acc-ada": "acc-ada"}
    names |= {f"{method} overlapped": f"{name} overlapped" for method, name in names.items()}
    names |= {"local-lin": "local-lin", "local-ada": f"local-ada {statistics}"}
    if "local-ada-nostale" in blocks[0].closings:
        names["local-ada-nostale"] = "local-ada-nostale"

    def cost_model(some: Sequence[Block]) -> CostModel:
        paces = pooled_paces(some)
        apart = SampleSummary.pooled(block.apart for block in some)
        if not apart.count:  # one round per block: the ranks' variation is then assumed to be independent
            apart = SampleSummary.pooled(pace.micro_batch for pace in paces)
        update, collect = (max(getattr(pace, part).mean for pace in paces) for part in ("update", "collect"))
        costs = {}
        for method, name in names.items():
            closing, collective, collecting = (
                SampleSummary.pooled(getattr(block.closings[name], part) for block in some).mean
                for part in ("step", "collective", "collect")
            )
            closing = max(closing, 0.0)  # of overlapped sums it is a difference, which may be lost in the noise
            costs[method] = Cost(closing, update, collect if method.startswith("local") else collecting, collective)
        outer = [block.closings["local-lin outer"].step for block in some if "local-lin outer" in block.closings]
        without_overlap = CostModel(
            micro_batch=tuple(pace.micro_batch.mean for pace in paces),
            costs=costs,
            grad_sqr=max(SampleSummary.pooled(block.grad_sqr for block in some).mean, 0.0),
            grad_var=SampleSummary.pooled(block.grad_var for block in some).mean,
            variation=apart.deviation / fmean(pace.micro_batch.mean for pace in paces),
            accumulate=measured.accumulate,
            c=c,
            epoch=measured.epoch,
            islands={n: island_cost(n, some) for n in blocks[0].islands},
            backward=max(pace.backward.mean for pace in paces),
            buckets=measured.buckets,
            outer=SampleSummary.pooled(outer).mean - costs["local-lin"].closing if outer else None,
        )
        return replace(without_overlap, overlap=overlap_cost(without_overlap, some))

    def overlap_cost(given: CostModel, some: Sequence[Block]) -> OverlapCost:
        times = [block.overlap for block in some if block.overlap]
        beyond, own_work = (
            SampleSummary.pooled(getattr(one, part) for one in times).mean for part in ("beyond", "own_work")
        )
        cost = given.costs["local-lin"]
        hidden = min(cost.collective, times[0].overlap * step_seconds(given, "local-lin"))
        gained = min((cost.collective - beyond) / hidden, 1.0) if hidden else 0.0
        return OverlapCost(gained, max(own_work - (cost.closing - cost.update - cost.collective), 0.0))

    def island_cost(island: int, some: Sequence[Block]) -> IslandCost:
        latency, gradient, average = (
            SampleSummary.pooled(getattr(block.islands[island], part) for block in some).mean
            for part in ("latency", "gradient", "average")
        )
        num_bytes = sum(bucket.bytes for bucket in measured.buckets)
        return IslandCost(SumTime.through(latency, num_bytes, gradient), average)

    return Estimate(cost_model(blocks), tuple(cost_model([*blocks[:i], *blocks[i + 1 :]]) for i in range(len(blocks))))


def pooled_paces(blocks: Sequence[Block]) -> list[StepTimes]:
    """Returns the times of each rank, pooled over all blocks."""
    ranks = zip(*(block.paces for block in blocks), strict=True)
    parts = ("micro_batch", "waiting", "update", "collect", "backward")
    return [
        StepTimes(*(SampleSummary.pooled(getattr(pace, part) for pace in rank) for part in parts)) for rank in ranks
    ]


@dataclass(frozen=True)
class Scenario:
    """The comparison with other gradient statistics.

    Attributes:
        label: name of the scenario.
        noise: σ²/G.
        comparison: the result.
    """

    label: str
    noise: float
    comparison: Comparison


@dataclass(frozen=True)
class Advice:
    """The recommendation and its reasons.

    Attributes:
        measured: the measurements.
        estimate: the cost model that follows from them.
        table: predictions by method and period, without islands.
        islands: the best prediction for local-ada with H > 1 by n, the ranks of an island.
        overlap: the comparison of local steps with and without overlap.
        now: the comparison with the statistics of the short run.
        scenarios: comparisons with the statistics of the run's beginning and end, and with more noise: σ²/G grows while the loss
            falls.
        m: time of an averaging over the time of a local step, by method.
        crossover: the m from which local steps pay against data parallelism with overlap, by Eqs. 16 and 49; None if never.
    """

    measured: Measurements
    estimate: Estimate
    table: Mapping[tuple[str, int], Prediction]
    islands: Mapping[int, Prediction]
    overlap: OverlapComparison
    now: Comparison
    scenarios: Sequence[Scenario]
    m: Mapping[str, float]
    crossover: float | None

    def error(self, one: Prediction) -> float:
        """Returns the standard error of `one.epoch`."""
        return self.estimate.error(lambda given: repeated(one, given).epoch)


def advise(measured: Measurements, c: float = 1.0, statistics: str = "sketch") -> Advice:
    """Derives the advice from measurements on two ranks or more; the arguments are those of `estimate`."""
    found = estimate(measured, c, statistics)
    cost_model = found.cost_model
    table = {
        (method, period): predict(cost_model, method, period)
        for method in cost_model.costs
        for period in ((1,) if method.startswith("sync") else PERIODS)
    }
    return Advice(
        measured=measured,
        estimate=found,
        table=table,
        islands={n: best_period(cost_model, n) for n in cost_model.island_sizes},
        overlap=compare_overlap(cost_model, found.ratio_error),
        now=compare(found),
        scenarios=tuple(
            Scenario(label, noise(one), compare(found, one.grad_sqr, one.grad_var))
            for label, one in _other_statistics(cost_model, measured)
        ),
        m={name: averaging_ratio(cost_model, name) for name in cost_model.costs},
        crossover=crossover(
            noise(cost_model),
            cost_model.num_workers,
            cost_model.accumulate,
            c,
            exposed=partial(exposed_share, cost_model),
        ),
    )


def compare(found: Estimate, grad_sqr: float | None = None, grad_var: float | None = None) -> Comparison:
    """Compares the methods, with the given or the measured gradient statistics, and adds the error."""

    def given(cost_model: CostModel) -> CostModel:
        if grad_sqr is None or grad_var is None:
            return cost_model
        return replace(cost_model, grad_sqr=grad_sqr, grad_var=grad_var)

    def ratio(cost_model: CostModel) -> float:
        # The same two predictions: with other measurements another period may be better, but then the ratio hardly differs.
        local, parallel = (repeated(one, given(cost_model)) for one in (best.local, best.data_parallel))
        return local.epoch / parallel.epoch

    best = compare_methods(given(found.cost_model))
    return replace(best, error=found.error(ratio))


def _other_statistics(cost_model: CostModel, measured: Measurements) -> Iterator[tuple[str, CostModel]]:
    for label, blocks in (("at its beginning", measured.blocks[:2]), ("at its end", measured.blocks[-2:])):
        grad_sqr, grad_var = (
            SampleSummary.pooled(getattr(block, part) for block in blocks) for part in ("grad_sqr", "grad_var")
        )
        if grad_var.count:
            yield label, replace(cost_model, grad_sqr=max(grad_sqr.mean, 0.0), grad_var=grad_var.mean)
    if cost_model.grad_sqr:
        for times in (3, 10, 100):
            yield f"{times} times as noisy", replace(cost_model, grad_var=times * cost_model.grad_var)
