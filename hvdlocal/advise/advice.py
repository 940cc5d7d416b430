"""Which method, and which H: predictions from measurements, with the doubt that is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import numpy as np

from hvdlocal.advise.measurements import Block, Measurements, SampleSummary, StepTimes
from hvdlocal.advise.predictions import (
    PERIODS,
    Comparison,
    Cost,
    CostModel,
    Prediction,
    averaging_ratio,
    compare_methods,
    crossover,
    noise,
    predict,
)


@dataclass(frozen=True)
class Estimate:
    """A cost model from all blocks of measurements, and those from all but one: the jackknife's.

    Attributes:
        cost_model: from all.
        without: without the first block, without the second …; empty when nothing is known of errors.
    """

    cost_model: CostModel
    without: Sequence[CostModel] = field(default_factory=tuple)

    def error(self, value: Callable[[CostModel], float]) -> float:
        """Standard error of what is computed from a cost model (Efron and Stein, 1981).

        It knows that load and network move all measurements of a block together.
        """
        values = [value(cost_model) for cost_model in self.without]
        return float(np.std(values)) * math.sqrt(len(values) - 1) if values else 0.0


def known(measured: Measurements, c: float, statistics: str) -> Estimate:
    """What was measured, as a cost model with errors.

    Args:
        measured: on two ranks or more.
        c: of the gain.
        statistics: that local-ada would send, "sketch" or "exact".
    """
    blocks = measured.blocks
    names = {"sync": "acc-lin", "acc-lin": "acc-lin", "acc-ada": "acc-ada", "local-lin": "local-lin"}
    names |= {"local-ada": f"local-ada {statistics}"}
    if "local-ada-nostale" in blocks[0].closings:
        names["local-ada-nostale"] = "local-ada-nostale"

    def cost_model(some: Sequence[Block]) -> CostModel:
        paces = pooled_paces(some)
        apart = SampleSummary.pooled(block.apart for block in some)
        if not apart.count:  # one round in a block: ranks are then taken to share nothing
            apart = SampleSummary.pooled(pace.micro_batch for pace in paces)
        update, collect = (max(getattr(pace, part).mean for pace in paces) for part in ("update", "collect"))
        costs = {}
        for method, name in names.items():
            closing = SampleSummary.pooled(block.closings[name].step for block in some).mean
            collecting = SampleSummary.pooled(block.closings[name].collect for block in some).mean
            costs[method] = Cost(closing, update, collect if method.startswith("local") else collecting)
        return CostModel(
            micro_batch=tuple(pace.micro_batch.mean for pace in paces),
            costs=costs,
            grad_sqr=max(SampleSummary.pooled(block.grad_sqr for block in some).mean, 0.0),
            grad_var=SampleSummary.pooled(block.grad_var for block in some).mean,
            variation=apart.deviation / fmean(pace.micro_batch.mean for pace in paces),
            accumulate=measured.accumulate,
            c=c,
            epoch=measured.epoch,
        )

    return Estimate(cost_model(blocks), tuple(cost_model([*blocks[:i], *blocks[i + 1 :]]) for i in range(len(blocks))))


def pooled_paces(blocks: Sequence[Block]) -> list[StepTimes]:
    """Of each rank, over all blocks."""
    ranks = zip(*(block.paces for block in blocks), strict=True)
    parts = ("micro_batch", "waiting", "update", "collect")
    return [
        StepTimes(*(SampleSummary.pooled(getattr(pace, part) for pace in rank) for part in parts)) for rank in ranks
    ]


@dataclass(frozen=True)
class Scenario:
    """The comparison with other gradient statistics.

    Attributes:
        label: which.
        noise: σ²/G.
        comparison: its outcome.
    """

    label: str
    noise: float
    comparison: Comparison


@dataclass(frozen=True)
class Advice:
    """What to do, and why.

    Attributes:
        measured: what everything follows from.
        known: the same as a cost model.
        table: predictions by method and period.
        now: the comparison with the statistics of the short run.
        scenarios: with those of its beginning and end, and larger ones: σ²/G grows while the loss falls.
        m: time of an averaging over that of a local step, by method.
        crossover: the m from which local steps pay, by Eqs. 16 and 49; None for never.
    """

    measured: Measurements
    known: Estimate
    table: Mapping[tuple[str, int], Prediction]
    now: Comparison
    scenarios: Sequence[Scenario]
    m: Mapping[str, float]
    crossover: float | None


def advise(measured: Measurements, c: float = 1.0, statistics: str = "sketch") -> Advice:
    """The advice that follows from measurements on two ranks or more; arguments as in `known`."""
    found = known(measured, c, statistics)
    cost_model = found.cost_model
    table = {
        (method, period): predict(cost_model, method, period)
        for method in cost_model.costs
        for period in (PERIODS if method != "sync" else (1,))
    }
    return Advice(
        measured=measured,
        known=found,
        table=table,
        now=compare(found),
        scenarios=tuple(
            Scenario(label, noise(one), compare(found, one.grad_sqr, one.grad_var))
            for label, one in _other_statistics(cost_model, measured)
        ),
        m={name: averaging_ratio(cost_model, name) for name in cost_model.costs},
        crossover=crossover(noise(cost_model), cost_model.num_workers, cost_model.accumulate, c),
    )


def compare(found: Estimate, grad_sqr: float | None = None, grad_var: float | None = None) -> Comparison:
    """The comparison with its error, with given statistics or those that were measured."""

    def given(cost_model: CostModel) -> CostModel:
        if grad_sqr is None or grad_var is None:
            return cost_model
        return replace(cost_model, grad_sqr=grad_sqr, grad_var=grad_var)

    def ratio(cost_model: CostModel) -> float:
        # Of the same two: with moved measurements another period may be as good, but then the ratio hardly differs.
        local, parallel = (
            predict(given(cost_model), one.method, one.period) for one in (best.local, best.data_parallel)
        )
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
