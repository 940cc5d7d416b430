"""The advice as numbers for programs."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from hvdlocal.advise.advice import Advice
from hvdlocal.advise.comparison import Comparison
from hvdlocal.advise.cost_model import OverlapCost, averaging_seconds, predicted_overlap


def as_dict(advice: Advice) -> dict[str, Any]:
    """Returns the advice and all measurements, in seconds and bytes."""
    cost_model = advice.estimate.cost_model
    return {
        "measured": asdict(advice.measured),
        "m": dict(advice.m),
        "grad_sqr": cost_model.grad_sqr,
        "grad_var": cost_model.grad_var,
        "predictions": [{**asdict(one), "epoch_error": advice.error(one)} for one in advice.table.values()],
        "overlap": {
            method: {
                "without": cost_model.costs[method].closing,
                "overlapped": cost_model.costs[f"{method} overlapped"].closing,
                "predicted": predicted_overlap(cost_model, method),
            }
            for method in ("sync", "acc-ada")
        },
        "islands": [
            {
                **asdict(one),
                "epoch_error": advice.error(one),
                "average_seconds": averaging_seconds(cost_model, one.method, island),
                "step_seconds": one.round / one.period,
            }
            for island, one in advice.islands.items()
        ],
        "averaging_overlap": {
            **asdict(cost_model.overlap or OverlapCost(0.0)),
            "predictions": [
                {**asdict(one), "epoch_error": advice.error(one)} for one in advice.overlap.predictions.values()
            ],
            "period": advice.overlap.best.period,
            "overlap": advice.overlap.best.overlap,
            "ratio": advice.overlap.ratio,
            "error": advice.overlap.error,
            "verdict": advice.overlap.verdict,
        },
        "outer_seconds": cost_model.outer,
        "contest": _comparison_dict(advice.now),
        "scenarios": [
            {"statistics": one.label, "grad_var_over_sqr": _finite(one.noise), **_comparison_dict(one.comparison)}
            for one in advice.scenarios
        ],
        "crossover_m": advice.crossover,
    }


def _comparison_dict(comparison: Comparison) -> dict[str, Any]:
    return {**asdict(comparison), "verdict": comparison.verdict}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
