"""The experiments whose truth is known: closed forms, limits, and that the reports say what was found."""

import json
import math

import numpy as np
import pytest

from hvdlocal.papers import bounds, valley
from hvdlocal.papers.experiment_report import ExperimentReport


def test_one_step_after_an_averaging_the_divergence_is_that_of_the_noise():
    """V_1 = (K−1)/K γ²σ², whatever the curvature; Lemma C.1's bound is K/(K−1) times that."""
    for lr in bounds.LEARNING_RATES:
        assert bounds.exact_divergence(lr)[0] == 0
        assert bounds.exact_divergence(lr)[1] == pytest.approx(7 / 8 * lr**2)
        assert bounds.divergence_bound(lr)[1] == pytest.approx(lr**2)


def test_without_curvature_the_divergence_is_a_random_walk(monkeypatch):
    monkeypatch.setattr(bounds, "CURVATURES", np.full(bounds.DIMENSIONS, 1e-9))
    assert bounds.exact_divergence(0.1) == pytest.approx(7 / 8 * bounds.divergence_bound(0.1), rel=1e-6)


def test_the_bounds_hold_and_the_quadratic_has_no_bias():
    finding = bounds.run(seed=1)
    assert all(holds for _, holds in finding.claims)
    for course in finding.record["courses"]:
        if course["function"] == "quadratic":
            assert max(course["bias"]) < 1e-25
            exact = bounds.exact_divergence(course["lr"], bounds.CURVATURES**2)
            assert course["spread"] == pytest.approx(exact, rel=0.05)
        else:
            assert max(course["bias"]) > 1e-8


def test_a_wrong_divergence_would_be_noticed(monkeypatch):
    """One worker too few in the closed form."""
    right = bounds.exact_divergence
    monkeypatch.setattr(bounds, "exact_divergence", lambda lr: right(lr) * (6 / 7) / (7 / 8))
    assert [holds for _, holds in bounds.run().claims] == [False, True, True, True]


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_the_prediction_solves_its_equation(factor):
    """Separable: x²/2 + ln x falls by F σ² t/(2K)."""
    times = np.linspace(0, 8, 9)
    x = valley.prediction(lambda _: factor, times)
    assert x**2 / 2 + np.log(x) == pytest.approx(2 + math.log(2) - factor * times / 16, abs=1e-6)


def test_the_drift_of_local_sgd_lies_between_sgd_and_k_times_sgd():
    factors = [valley.local_factor(beta, 1.0) for beta in (1e-4, 0.1, 1.0, 10.0, 1e4)]
    assert factors == sorted(factors)
    assert factors[0] == pytest.approx(1, abs=1e-3)
    assert factors[-1] == pytest.approx(8, abs=1e-3)
    assert valley.local_factor(0.5, 1.0) == pytest.approx(1 + 7 * math.exp(-1))  # ψ(½) = 1 − (1 − 1/e)


def test_the_mean_of_y_squared_is_what_the_drift_is_made_of(monkeypatch):
    """One round from y = 0 at η = 0.01: x falls by η Σ_j x E y_j², E y_j² = η²σ² (1 − a^j)/(1 − a), a = (1 − ηh)²."""
    lr, period, h = 0.01, 200, 5.0
    monkeypatch.setattr(valley, "TIME", period * lr**2)
    times, x = valley.simulate(period, lr, seed=0, replicas=4000)
    a = (1 - lr * h) ** 2
    squares = lr**2 * (1 - a ** np.arange(period)) / (1 - a)
    error = x[-1].std(ddof=1) / math.sqrt(x.shape[1])
    assert times == pytest.approx([0, period * lr**2])
    assert 2.0 - x[-1].mean() == pytest.approx(lr * 2.0 * squares.sum(), abs=4 * error + 5e-5)


def test_the_valley_behaves_as_the_sde_says(tmp_path):
    pytest.importorskip("scipy")
    finding = valley.run(seed=3)
    assert all(holds for _, holds in finding.claims)
    paths = finding.write(tmp_path / "valley")
    assert "| H = (0.5/η)² |" in paths[0].read_text()
    assert len(json.loads(paths[1].read_text())["curves"]) == 12
    pytest.importorskip("matplotlib")
    assert paths[2].read_bytes().startswith(b"<?xml")


def test_a_claim_that_fails_stands_out():
    finding = ExperimentReport(
        "t", "s", [("it rains", False), ("it pours", True)], ("a",), [["1"]], [], {}, lambda: None
    )
    assert "| it rains | **no** |\n| it pours | yes |" in finding.markdown()
