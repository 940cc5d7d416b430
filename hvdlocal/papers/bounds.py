"""Simulates a round of Local SGD where the truth is known: Lemma C.1 and Proposition 4.2 of Balles et al. (TMLR 2024).

On f(w) = ½ Σ λ_i w_i² with independent noise of variance σ²/d in every coordinate of a worker's gradient, j steps after an
averaging the workers' coordinates have variance q_i = γ²σ²/d · (1 − a_i^j)/(1 − a_i), a_i = (1 − γλ_i)², so that

    E V_j = (K−1)/K Σ q_i   and   E (1/K) Σ_k ‖∇f(w_k) − ∇f(w̄)‖² = (K−1)/K Σ λ_i² q_i.

The second function, Σ log cosh w_i, is equally smooth (L = 1) and has a bias, which a quadratic cannot have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hvdlocal.papers.experiment_report import ExperimentReport

if TYPE_CHECKING:
    from hvdlocal.figures.style import Figure

Array = npt.NDArray[np.float64]

NUM_WORKERS = 8
PERIOD = 32
DIMENSIONS = 20
CURVATURES: Array = np.geomspace(0.01, 1.0, DIMENSIONS)
"""λ; the largest is L = 1."""
VARIANCE = 1.0
"""σ², of one worker's gradient."""
LEARNING_RATES = (0.1, 0.5)
"""γL."""
ROUNDS = 4_000
"""Number of independent rounds for the means."""


@dataclass(frozen=True)
class Course:
    """Means over independent rounds, before each of the H steps and after the last one, as arrays of length H + 1.

    Attributes:
        divergence: V, (1/K) Σ ‖w_k − w̄‖² (Eq. 22).
        spread: (1/K) Σ ‖∇f(w_k) − ∇f(w̄)‖², the proof's bound on the bias (Eq. 28).
        bias: ‖(1/K) Σ ∇f(w_k) − ∇f(w̄)‖².
        error: ‖ḡ − ∇f(w̄)‖², the mean squared error of the implicit gradient estimate (Eq. 6).
        standard_errors: standard errors of `divergence` and of `error`.
    """

    divergence: Array
    spread: Array
    bias: Array
    error: Array
    standard_errors: tuple[Array, Array]


Courses = dict[float, Course]
"""Courses on one function, by learning rate."""


def simulate(gradient: Callable[[Array], Array], lr: float, seed: int, rounds: int = ROUNDS) -> Course:
    """Simulates rounds of Local SGD from the point (1, …, 1).

    Args:
        gradient: ∇f of an array (…, d).
        lr: γ.
        seed: seed of the noise.
        rounds: number of rounds.
    """
    random = np.random.default_rng(seed)
    w = np.ones((rounds, NUM_WORKERS, DIMENSIONS))
    scale = np.sqrt(VARIANCE / DIMENSIONS)
    columns: list[list[Array]] = [[], [], [], []]
    for _ in range(PERIOD + 1):
        mean = w.mean(axis=1, keepdims=True)
        true, at_mean = gradient(w), gradient(mean)
        noisy = true + random.normal(0.0, scale, w.shape)
        columns[0].append(((w - mean) ** 2).sum(axis=2).mean(axis=1))
        columns[1].append(((true - at_mean) ** 2).sum(axis=2).mean(axis=1))
        columns[2].append(((true.mean(axis=1) - at_mean[:, 0]) ** 2).sum(axis=1))
        columns[3].append(((noisy.mean(axis=1) - at_mean[:, 0]) ** 2).sum(axis=1))
        w = w - lr * noisy
    samples = [np.stack(column) for column in columns]
    divergence, spread, bias, error = (each.mean(axis=1) for each in samples)
    errors = [samples[i].std(axis=1, ddof=1) / np.sqrt(rounds) for i in (0, 3)]
    return Course(divergence, spread, bias, error, (errors[0], errors[1]))


def quadratic(w: Array) -> Array:
    """Returns the gradient of ½ Σ λ_i w_i²."""
    gradient: Array = CURVATURES * w
    return gradient


def log_cosh(w: Array) -> Array:
    """Returns the gradient of Σ log cosh w_i."""
    gradient: Array = np.tanh(w)
    return gradient


def exact_divergence(lr: float, weights: Array | float = 1.0) -> Array:
    """Returns E V_j on the quadratic for j = 0 … H or, with weights λ², the expected spread of the gradients."""
    decay = (1 - lr * CURVATURES) ** 2
    steps = np.arange(PERIOD + 1)[:, None]
    variances = lr**2 * VARIANCE / DIMENSIONS * (1 - decay**steps) / (1 - decay)
    total: Array = (NUM_WORKERS - 1) / NUM_WORKERS * (weights * variances).sum(axis=1)
    return total


def divergence_bound(lr: float) -> Array:
    """Returns the bound of Lemma C.1, step by step (Eq. 37): V_j ≤ j γ² σ²."""
    return np.arange(PERIOD + 1) * np.float64(lr**2 * VARIANCE)


def error_bound(lr: float) -> Array:
    """Returns the bound of Proposition 4.2 with Lemma C.1, step by step (Eq. 29), for L = 1."""
    return VARIANCE / NUM_WORKERS + divergence_bound(lr)


def run(seed: int = 0) -> ExperimentReport:
    """Runs the experiment, which takes some seconds."""
    quadratics = {lr: simulate(quadratic, lr, seed) for lr in LEARNING_RATES}
    others = {lr: simulate(log_cosh, lr, seed + 1) for lr in LEARNING_RATES}
    return ExperimentReport(
        "Lemma C.1 and Proposition 4.2: divergence and gradient error within a round",
        f"Local SGD from one point, K = {NUM_WORKERS}, H = {PERIOD}, gradient noise of variance σ² = {VARIANCE:g}, "
        f"{DIMENSIONS} dimensions, L = 1, means over {ROUNDS:,} rounds, numbers from before the last step: on a quadratic with "
        f"curvatures from {CURVATURES[0]:g} to {CURVATURES[-1]:g}, where the truth has a closed form, and on Σ log cosh w.",
        _claims(quadratics, others),
        ("function", "γL", "V", "exact", "bound", "spread of gradients", "largest bias²", "error", "bound"),
        _table(quadratics, others),
        _remarks(quadratics, others),
        _record(quadratics, others),
        lambda: _figure(quadratics, others),
    )


def _claims(quadratics: Courses, others: Courses) -> list[tuple[str, bool]]:
    both = [*quadratics.items(), *others.items()]

    def within(measured: Array, truth: Array | float, error: Array) -> bool:
        return bool((np.abs(measured - truth) <= 4.5 * error + 1e-12).all())

    return [
        (
            "quadratic: the divergence is what it should be, at every step (4.5 standard errors)",
            all(within(c.divergence, exact_divergence(lr), c.standard_errors[0]) for lr, c in quadratics.items()),
        ),
        (
            "Lemma C.1: the divergence stays below j γ²σ² after j steps",
            all((c.divergence <= divergence_bound(lr)).all() for lr, c in both),
        ),
        (
            "Proposition 4.2: the mean squared error stays below σ²/K + j L²γ²σ²",
            all((c.error <= error_bound(lr) + 4.5 * c.standard_errors[1]).all() for lr, c in both),
        ),
        (
            "quadratic: the error is σ²/K at every step: the bias is zero",
            all(within(c.error, VARIANCE / NUM_WORKERS, c.standard_errors[1]) for c in quadratics.values()),
        ),
    ]


def _table(quadratics: Courses, others: Courses) -> list[list[str]]:
    """Returns a row of numbers from before the last step for each function and rate."""
    last = PERIOD - 1
    return [
        [
            name,
            f"{lr:g}",
            f"{course.divergence[last]:.4f}",
            f"{exact_divergence(lr)[last]:.4f}" if name == "quadratic" else "",
            f"{divergence_bound(lr)[last]:.4f}",
            f"{course.spread[last]:.4f}",
            f"{course.bias.max():.2g}",
            f"{course.error[last]:.4f}",
            f"{error_bound(lr)[last]:.4f}",
        ]
        for name, courses in (("quadratic", quadratics), ("log cosh", others))
        for lr, course in courses.items()
    ]


def _remarks(quadratics: Courses, others: Courses) -> list[str]:
    lr, worst = max(others.items(), key=lambda item: item[1].bias.max())
    step = int(worst.bias.argmax())
    quickest, last = max(LEARNING_RATES), PERIOD - 1
    spread, allowed = quadratics[quickest].spread[last], divergence_bound(quickest)[last]
    return [
        "On a quadratic the mean of the workers' gradients is the gradient at their mean, so Local SGD's implicit gradient has "
        "no bias at all, where Eq. 6 has one (it comes from Jensen's inequality in Eq. 28). On log cosh there is one: its square "
        f"is {worst.bias[step]:.2g} at most, at γL = {lr:g} after {step} step{'s' if step > 1 else ''}, where the bound allows "
        f"for {divergence_bound(lr)[step]:.2g}.",
        "The term in H − 1 of LocalAdaScale's gain comes from the same bound, L²V ≤ j γ²σ², put in place of the spread of the "
        f"gradients (Eqs. 33, 37 and 38). On this quadratic, at γL = {quickest:g} before the last step, the spread is "
        f"{spread:.2g} and the bound {allowed:.2g}: most directions are flatter than L.",
    ]


def _record(quadratics: Courses, others: Courses) -> dict[str, Any]:
    return {
        "num_workers": NUM_WORKERS,
        "variance": VARIANCE,
        "rounds": ROUNDS,
        "courses": [
            {
                "function": name,
                "lr": lr,
                "divergence": course.divergence.tolist(),
                "divergence_bound": divergence_bound(lr).tolist(),
                "spread": course.spread.tolist(),
                "bias": course.bias.tolist(),
                "error": course.error.tolist(),
                "error_bound": error_bound(lr).tolist(),
            }
            for name, courses in (("quadratic", quadratics), ("log cosh", others))
            for lr, course in courses.items()
        ],
    }


def _figure(quadratics: Courses, others: Courses) -> Figure:
    from hvdlocal.figures.style import COLORS, DASHES, new_figure, style

    steps = np.arange(PERIOD + 1)
    with style():
        figure, axes = new_figure(2, len(LEARNING_RATES), width=10, height=3.2, sharex=True)
        for column, lr in enumerate(LEARNING_RATES):
            upper, lower = axes[0][column], axes[1][column]
            upper.plot(steps, divergence_bound(lr), color=COLORS[6], ls=DASHES[1], label="bound (Eq. 37)")
            upper.plot(steps, exact_divergence(lr), color=COLORS[0], label="quadratic, exact")
            upper.plot(steps[::2], quadratics[lr].divergence[::2], "o", color=COLORS[0], label="quadratic, simulated")
            upper.plot(steps[::2], others[lr].divergence[::2], "s", color=COLORS[1], label="log cosh, simulated")
            upper.set(title=f"γL = {lr:g}", ylabel="Divergence V")
            lower.plot(steps, error_bound(lr), color=COLORS[6], ls=DASHES[1], label="bound (Eq. 29)")
            lower.axhline(VARIANCE / NUM_WORKERS, color=COLORS[2], label="σ²/K")
            lower.plot(steps[::2], quadratics[lr].error[::2], "o", color=COLORS[0])
            lower.plot(steps[::2], others[lr].error[::2], "s", color=COLORS[1])
            lower.set(xlabel="Steps since the averaging", ylabel="Error of the gradient (Eq. 6)", ylim=(0, None))
        axes[0][0].legend()
        axes[1][0].legend()
    return figure
