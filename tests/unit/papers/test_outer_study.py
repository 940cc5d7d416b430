"""The study of outer optimizers: how rates are tuned, which runs follow from which, and what the report says."""

import math

import pytest

from hvdlocal.cli.configuration import parse
from hvdlocal.papers.outer_report import REFERENCES, SIGNS, OuterReport
from hvdlocal.papers.outer_study import (
    BY_NAME,
    METHODS,
    NESTEROV_RATES,
    RATES,
    SHAKESPEARE,
    SWEEP,
    Value,
    planned,
    swept,
    swept_rate,
    tune,
)
from hvdlocal.training.config_checks import check_ranges

ONE = BY_NAME["one"]


def rate_of(point):
    return float(point.settings[-2].removeprefix("--optimizer.lr="))


def best_at(rate, bits=2.0):
    """All runs are finished, with the least bits per byte at this rate."""
    return lambda point: Value(bits + abs(math.log2(rate_of(point) / rate)), 0.25)


def test_nothing_follows_before_all_first_rates_are_tried():
    assert tune(ONE, 0, lambda point: None).rates == [*RATES]
    some = {ONE.run(rate, 0): Value(1.0) for rate in RATES[:2]}
    assert tune(ONE, 0, some.get).best is None


@pytest.mark.parametrize(
    ("best", "rates"),
    [
        (4e-3, [2e-3, 4e-3, 8e-3]),
        (8e-3, [2e-3, 4e-3, 8e-3, 16e-3]),
        (32e-3, [2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3]),
        (2e-3, [1e-3, 2e-3, 4e-3, 8e-3]),
    ],
)
def test_rates_are_tried_until_the_best_is_not_at_an_edge(best, rates):
    found = tune(ONE, 0, best_at(best))
    assert found.best == best
    assert found.rates == rates


def test_rates_at_which_every_run_diverges_are_halved():
    found = tune(ONE, 0, lambda point: Value(math.inf) if rate_of(point) > 5e-4 else best_at(5e-4)(point))
    assert found.best == 5e-4
    assert found.rates == [2.5e-4, 5e-4, 1e-3, *RATES]


def test_the_other_seeds_run_at_the_best_rate():
    points = planned([ONE], [5, 6, 7], best_at(4e-3))
    assert [(rate_of(point), point.seed) for point in points] == [
        *((rate, 5) for rate in RATES),
        *((4e-3, seed) for seed in (6, 7)),
    ]
    assert planned([ONE], [5, 6], lambda point: None) == points[:3]


def test_the_sweep_shares_runs_with_the_methods():
    assert swept(4, 64, 1.0, 0.0) is BY_NAME["local-64"]
    assert swept(4, 16, 0.7, 0.9) is BY_NAME["diloco-16"]
    assert swept(2, 16, 0.7, 0.9) is BY_NAME["diloco-16-2"]
    points = planned(METHODS, [0, 1], best_at(4e-3))
    shared = 7  # γ = 1 with β = 0, and γ = 0.7 with both β above 0, for K = 4 at both H; γ = 0.7 with β = 0.9 for K = 2 at H = 16
    at_an_edge = [method for method in METHODS if method.rates == NESTEROV_RATES]  # which need a fourth rate
    assert len(points) == len(set(points)) == len(METHODS) * (3 + 1) + len(at_an_edge) + 9 * len(SWEEP) - shared
    assert len({point.name for point in points}) == len(points)


def test_the_sweep_uses_the_rate_that_suits_its_momentum():
    """DiLoCo's best rate for its β, plain averaging's for smaller ones; a method with Nesterov's step begins lower."""

    def found(point):
        return best_at(2e-3 if point.method.name.startswith("diloco") else 4e-3)(point)

    assert [swept_rate(16, beta, 0, found) for beta in (0.0, 0.5, 0.9)] == [4e-3, 4e-3, 2e-3]
    assert tune(BY_NAME["diloco-16"], 0, found).rates == [1e-3, 2e-3, 4e-3]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_settings_of_the_methods(method):
    """QSR's rounds are the same at every learning rate."""
    config = parse([str(SHAKESPEARE.path), *method.run(8e-3, 3).settings, "--output=x"])
    check_ranges(config)
    assert (config.optimizer.lr, config.seed) == (8e-3, 3)
    assert method.workers in REFERENCES
    if method.alpha:
        assert config.method.period.alpha == pytest.approx(2 * config.optimizer.lr)


# -- the report --------------------------------------------------------------------------------------------------------


def report(bits, seeds=(0, 1, 2), methods=METHODS):
    """Of runs whose bits per byte at the rate 0.004 are those of the method, one for each seed, and more at other rates."""

    def found(point):
        values = bits.get(point.method.name)
        if values is None or point.seed not in seeds:
            return None
        return Value(values[seeds.index(point.seed)] + (rate_of(point) != 4e-3), 0.25)

    return OuterReport(methods, seeds, found, 1.3)


def test_differences_are_taken_seed_by_seed():
    """The seeds differ by more than the methods do: 0.1 ± 0.01/√3 here."""
    found = report({"sync": [2.0, 2.5, 3.0], "local-16": [2.1, 2.61, 3.09]})
    difference = found.difference("local-16", "sync")
    assert (difference.seeds, difference.resolved) == (3, 1)
    assert difference.mean == pytest.approx(0.1)
    assert difference.error == pytest.approx(0.01 / math.sqrt(3))
    text = found.markdown()
    assert "| 4 | data parallelism | 0.004 | 2.500 ± 0.500 |  | 25.0% |" in text
    assert "| 4 | local steps, H = 16 | 0.004 | 2.600 ± 0.495 | +0.100 ± 0.006 | 25.0% |" in text


def test_verdicts():
    found = report(
        {
            "sync-2": [2.0, 2.1, 2.2],
            "diloco-16-2": [2.1, 2.21, 2.3],
            "sync": [2.0, 2.1, 2.2],
            "diloco-16": [1.9, 2.01, 2.1],
            "diloco-64": [1.9, 2.02, 2.08],
            "local-16": [2.0, 2.1, 2.2],
            "overlap-1": [2.01, 2.09, 2.2],
            "overlap-5": [2.1, 2.21, 2.3],
            "one": [2.0, 2.1, 2.2],
        }
    )
    assert [verdict for _, _, verdict in found.verdicts()] == [
        "yes",
        "**no**",
        "**no**",
        "not resolved",
        "not known",
        "yes (not resolved)",
        "**no**",
        "not known",
    ]
    assert (
        "| (a) DiLoCo loses to data parallelism, K = 2 | +0.03 (35M, H = 30) | +0.103 ± 0.003 | +0.072 | 3 | yes |"
        in (found.markdown())
    )


def test_one_seed_resolves_nothing():
    found = report({sign.method: [2.0] for sign in SIGNS} | {sign.other: [1.0] for sign in SIGNS}, seeds=(0,))
    assert {verdict for _, _, verdict in found.verdicts()} == {"not known"}


def test_the_sweep_is_a_table():
    """At the best rate, with the least at γ = 0.7 and β = 0.5."""

    def found(point):
        return Value((2.5 if "0.7-0.5" in point.method.name else 3.0) + (rate_of(point) != 4e-3))

    text = OuterReport(METHODS, [0], found, 1.3).markdown()
    assert text.count("| 3.000 | 3.000 | 3.000 | 3.000 | **2.500** | 3.000 | 3.000 | 3.000 | 3.000 |") == len(SWEEP)


def test_runs_that_diverge_are_told(tmp_path):
    found = report({"one": [2.0, math.inf, 2.2]}, methods=[ONE])
    assert "| 1 | one worker | 0.004 | 2.100 ± 0.141 (1 diverged) |" in found.markdown()
    assert "Infinity" not in found.write(tmp_path / "outer")[1].read_text()


def test_without_runs_there_is_a_report_without_a_figure(tmp_path):
    assert [path.suffix for path in report({}).write(tmp_path / "outer")] == [".md", ".json"]
