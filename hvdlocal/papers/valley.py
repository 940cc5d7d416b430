"""Simulates the drift along a valley of minima towards its flat end, a toy model of the Quadratic Synchronization Rule.

L(x, y) = ½ h(x) y², h(x) = 1 + x²: every point with y = 0 is a minimum, and the flattest one is at x = 0. With gradient noise
of variance σ² across the valley (σ²/K for data parallelism), y² settles at about ησ²/(2Kh) after an averaging, and its mean
pushes x towards smaller h by η h'(x) y²/2 a step. In the time t = η² · steps this is, for small η,

    dx/dt = −F σ²/(4K) · h'(x)/h(x),   F = 1 for SGD,
                                       F = 1 + (K−1) ψ(βh) for Local SGD with H = β/η, ψ(u) = 1 − (1 − e^(−2u))/(2u),
                                       F = K for H = (α/η)²:

the slow SDEs of Gu, Lyu, Arora, Zhang and Huang (ICLR 2024), whose diffusion along the valley vanishes here. Within a round
the workers' y² grows to K times that of their mean; ψ is the share of this growth that a round reaches on average.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hvdlocal.papers.experiment_report import ExperimentReport

if TYPE_CHECKING:
    from hvdlocal.figures.style import Figure

Array = npt.NDArray[np.float64]
Curves = dict[tuple[str, float], tuple[Array, Array]]
"""Times, and x by time and replica, for each rule and learning rate."""

NUM_WORKERS = 8
VARIANCE = 1.0
"""σ², of one worker's gradient."""
START = 2.0
"""The first x; y starts at 0."""
TIME = 8.0
"""t = η² · steps at the end."""
POINTS = 16
"""Number of points of a curve."""
BETA = 0.5
ALPHA = 0.5
LEARNING_RATES = (0.1, 0.05, 0.0125)
REPLICAS = 512
"""Number of independent runs."""


def prediction(factor: Callable[[float], float], times: Array) -> Array:
    """Returns x(t) of dx/dt = −F(h(x)) σ²/(4K) h'(x)/h(x).

    Args:
        factor: F as a function of the curvature h.
        times: ascending times from 0.
    """
    from scipy.integrate import solve_ivp

    def slope(_: float, x: Array) -> Array:
        curvature = 1 + x**2
        return -factor(float(curvature[0])) * VARIANCE / (4 * NUM_WORKERS) * 2 * x / curvature

    found: Array = solve_ivp(slope, (0.0, times[-1]), [START], t_eval=times, rtol=1e-8, atol=1e-10).y[0]
    return found


def local_factor(beta: float, curvature: float) -> float:
    """Returns F of Local SGD with H = β/η: from 1 as β → 0 to K as β → ∞."""
    u = 2 * beta * curvature
    return 1 + (NUM_WORKERS - 1) * (1 + np.expm1(-u) / u)


@dataclass(frozen=True)
class Rule:
    """A rule for H as a function of η, and the theory's factor F as a function of the curvature."""

    name: str
    period: Callable[[float], int]
    factor: Callable[[float], float]


RULES = (
    Rule("SGD, all workers' batches", lambda _: 1, lambda _: 1.0),
    Rule("H = 4", lambda _: 4, lambda _: 1.0),
    Rule(f"H = {BETA:g}/η", lambda lr: round(BETA / lr), lambda h: local_factor(BETA, h)),
    Rule(f"H = ({ALPHA:g}/η)²", lambda lr: round((ALPHA / lr) ** 2), lambda _: float(NUM_WORKERS)),
)


def simulate(
    period: int, lr: float, seed: int | np.random.SeedSequence, replicas: int = REPLICAS
) -> tuple[Array, Array]:
    """Simulates runs, and returns x of the average at time 0 and at the averaging after each of `POINTS` times.

    Args:
        period: H; 1 stands for data parallelism, which is simulated as a single worker with 1/K of the variance.
        lr: η.
        seed: seed of the noise.
        replicas: number of independent runs.

    Returns:
        The times, and x by time and replica.
    """
    random = np.random.default_rng(seed)
    workers = 1 if period == 1 else NUM_WORKERS
    deviation = np.sqrt(VARIANCE / (NUM_WORKERS if period == 1 else 1))
    x, y = np.full((replicas, workers), START), np.zeros((replicas, workers))
    steps = round(TIME / lr**2)
    times, points = [0.0], [x[:, 0].copy()]
    following = steps / POINTS
    for step in range(1, steps + 1):
        noise = random.normal(0.0, deviation, x.shape)
        x, y = x - lr * x * y**2, y - lr * ((1 + x**2) * y + noise)
        if step % period and step != steps:
            continue
        if workers > 1:
            x[:], y[:] = x.mean(axis=1, keepdims=True), y.mean(axis=1, keepdims=True)
        if step >= following:
            times.append(step * lr**2)
            points.append(x[:, 0].copy())
            following += steps / POINTS
    return np.array(times), np.stack(points)


def run(seed: int = 0) -> ExperimentReport:
    """Runs the experiment, which takes about a minute."""
    points = [(rule, lr) for lr in LEARNING_RATES for rule in RULES]
    seeds = np.random.SeedSequence(seed).spawn(len(points))
    curves = {
        (rule.name, lr): simulate(rule.period(lr), lr, own) for (rule, lr), own in zip(points, seeds, strict=True)
    }
    ends = {(rule.name, lr): _end(rule, curves[rule.name, lr][1][-1]) for rule in RULES for lr in LEARNING_RATES}
    table = []
    for rule in RULES:
        found = [
            f"{ends[rule.name, lr].mean:.3f} ± {ends[rule.name, lr].error:.3f} (H = {rule.period(lr)})"
            for lr in LEARNING_RATES
        ]
        table.append([rule.name, *found, f"{ends[rule.name, LEARNING_RATES[0]].predicted:.3f}"])
    remarks = [
        "H ∝ 1/η has a part of the effect, H ∝ 1/η² all of it; so would any H that grows faster than 1/η. The valley is straight "
        "and the noise is across it, so that averaging after a round of any length stays in the valley: this toy does not show "
        "why more than 1/η² would be too much.",
    ]
    return ExperimentReport(
        "The drift towards flat minima: SGD, H ∝ 1/η and H ∝ 1/η² in a valley",
        f"L(x, y) = ½ (1 + x²) y², gradient noise of variance σ² = {VARIANCE:g} across the valley, K = {NUM_WORKERS}, from x = "
        f"{START:g}; x after the time η² · steps = {TIME:g}, mean and standard error over {REPLICAS} runs, beside the slow SDE. "
        "The flattest minimum is at x = 0.",
        _claims(ends),
        ("rule", *(f"η = {lr:g}" for lr in LEARNING_RATES), "SDE"),
        table,
        remarks,
        _record(curves),
        lambda: _figure(curves),
    )


@dataclass(frozen=True)
class _End:
    """The end of a curve: mean x, the SDE's prediction, and the standard error of the mean."""

    mean: float
    predicted: float
    error: float


def _end(rule: Rule, x: Array) -> _End:
    predicted = float(prediction(rule.factor, np.array([0.0, TIME]))[-1])
    return _End(float(x.mean()), predicted, float(x.std(ddof=1) / np.sqrt(len(x))))


def _claims(ends: dict[tuple[str, float], _End]) -> list[tuple[str, bool]]:
    sgd, _, linear, quadratic = (ends[rule.name, LEARNING_RATES[-1]] for rule in RULES)
    near = 0.02

    def agrees(end: _End) -> bool:
        return abs(end.mean - end.predicted) < near

    constant = [ends[RULES[1].name, lr] for lr in LEARNING_RATES]
    return [
        (
            "Local SGD drifts faster than SGD with H ∝ 1/η, and fastest with H ∝ 1/η²",
            sgd.mean > linear.mean > quadratic.mean,
        ),
        (f"SGD: as the SDE says, to {near:g}, at the smallest η", agrees(sgd)),
        (f"H ∝ 1/η: as the SDE says, to {near:g}, at the smallest η", agrees(linear)),
        (f"H ∝ 1/η²: as the SDE says, K times SGD's drift, to {near:g}, at the smallest η", agrees(quadratic)),
        (
            "a constant H is SGD in the limit: nearer to it with every smaller η",
            _falls([abs(end.mean - end.predicted) for end in constant]),
        ),
    ]


def _record(curves: Curves) -> dict[str, Any]:
    return {
        "num_workers": NUM_WORKERS,
        "variance": VARIANCE,
        "replicas": REPLICAS,
        "curves": [
            {
                "rule": rule.name,
                "lr": lr,
                "period": rule.period(lr),
                "time": curves[rule.name, lr][0].tolist(),
                "x": curves[rule.name, lr][1].mean(axis=1).tolist(),
                "predicted": prediction(rule.factor, curves[rule.name, lr][0]).tolist(),
            }
            for rule in RULES
            for lr in LEARNING_RATES
        ],
    }


def _falls(values: list[float]) -> bool:
    return all(a > b for a, b in pairwise(values))


def _figure(curves: Curves) -> Figure:
    from hvdlocal.figures.style import COLORS, new_figure, style

    grid = np.linspace(0, TIME, 100)
    with style():
        figure, axes = new_figure(1, len(LEARNING_RATES), width=11, height=3.3, sharey=True)
        for panel, lr in zip(axes[0], LEARNING_RATES, strict=True):
            for rule, color in zip(RULES, (COLORS[0], COLORS[5], COLORS[2], COLORS[1]), strict=True):
                times, x = curves[rule.name, lr]
                panel.errorbar(
                    times,
                    x.mean(axis=1),
                    x.std(axis=1, ddof=1) / np.sqrt(x.shape[1]),
                    fmt="o",
                    color=color,
                    label=rule.name,
                )
                if rule.name != "H = 4":  # its limit is SGD's
                    panel.plot(grid, prediction(rule.factor, grid), color=color)
            panel.set(title=f"η = {lr:g}", xlabel="Time: η² · steps", ylim=(0, None))
        axes[0][0].set_ylabel("x; lines: SDE")
        axes[0][0].legend(loc="lower left")
    return figure
