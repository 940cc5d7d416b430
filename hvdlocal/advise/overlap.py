"""Compares local steps whose averages go on behind the next steps with local steps that wait for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from hvdlocal.advise.comparison import CERTAIN
from hvdlocal.advise.cost_model import CostModel, least_overlap, step_seconds
from hvdlocal.advise.predictions import PERIODS, Prediction, predict

WORTH = 1 / 1.1
"""Ratio of times that overlap must reach: above it, as with m/H below 0.1, it gains too little for two more flat buffers."""


@dataclass(frozen=True)
class OverlapComparison:
    """Local steps with overlap against the best without.

    Attributes:
        predictions: for local-lin by H > 1, without islands, each with the least τ that makes averaging free, or τ = H. The
            statistics of local-ada are of little use with overlap.
        without: the same without overlap.
        error: standard error of `ratio`.
    """

    predictions: Mapping[int, Prediction]
    without: Mapping[int, Prediction]
    error: float = 0.0

    @property
    def best(self) -> Prediction:
        """The prediction with overlap for the best H."""
        return min(self.predictions.values(), key=lambda one: one.epoch)

    @property
    def best_without(self) -> Prediction:
        """The prediction without overlap for its best H."""
        return min(self.without.values(), key=lambda one: one.epoch)

    @property
    def ratio(self) -> float:
        """Time of `best` over time of `best_without`, at equal progress."""
        return self.best.epoch / self.best_without.epoch

    @property
    def verdict(self) -> str:
        """Whether overlap "pays", gains "little" (or loses), or whether that is "undecided" within the noise."""
        doubt = CERTAIN * self.error
        if self.ratio <= WORTH and self.ratio + doubt < 1:
            return "pays"
        return "undecided" if self.ratio - doubt < WORTH else "little"


def compare_overlap(cost_model: CostModel, ratio_error: Callable[[Prediction, Prediction], float]) -> OverlapComparison:
    """Compares the predictions.

    Args:
        cost_model: the measured costs, with that of overlap.
        ratio_error: returns the standard error of the ratio of two predicted times.
    """
    method, periods = "local-lin", [period for period in PERIODS if period > 1]
    free = least_overlap(cost_model.costs[method].collective, step_seconds(cost_model, method))
    found = OverlapComparison(
        {period: predict(cost_model, method, period, overlap=min(free, period)) for period in periods},
        {period: predict(cost_model, method, period) for period in periods},
    )
    return replace(found, error=ratio_error(found.best, found.best_without))
