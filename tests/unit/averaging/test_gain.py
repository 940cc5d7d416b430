"""The gain ratio, its statistics and their moving averages against published numbers."""

import math

import pytest

import hvdlocal
from hvdlocal.averaging.gain import ScalingContext
from hvdlocal.averaging.statistics import MovingAverage, SmoothedStatistics, default_smoothing

# Eq. 14 for K = 8: σ²/G, then ρ for H = 1, 2, 8, 64.
GAIN_TABLE = [
    (0, [1, 1, 1, 1]),
    (1, [1.777778, 1.253785, 0.684504, 0.268120]),
    (10, [4.888889, 2.692330, 1.300620, 0.480535]),
    (100, [7.481481, 5.696529, 3.296727, 1.332115]),
]


@pytest.mark.parametrize(("ratio", "gains"), GAIN_TABLE)
def test_gain_table(ratio, gains):
    for period, gain in zip((1, 2, 8, 64), gains, strict=True):
        assert hvdlocal.gain_ratio(1.0, ratio, 8, period) == pytest.approx(gain, abs=5e-7)
        assert hvdlocal.gain_ratio(3.7, 3.7 * ratio, 8, period) == pytest.approx(gain, abs=5e-7), "scale-free"


@pytest.mark.parametrize("period", [1, 2, 64])
def test_gain_without_signal_is_the_number_of_workers(period):
    assert hvdlocal.gain_ratio(0.0, 2.0, 8, period) == pytest.approx(8)
    assert hvdlocal.gain_ratio(0.0, 2.0, 8, period, accumulate=3) == pytest.approx(24)


def test_gain_may_be_below_one_for_local_steps():
    gains = [hvdlocal.gain_ratio(1.0, x / 1000, 8, 8) for x in range(1, 3000)]
    assert min(gains) == pytest.approx(0.669, abs=1e-3)
    assert gains.index(min(gains)) / 1000 == pytest.approx(0.60, abs=0.02)


def test_c_interpolates_between_adascale_and_local_adascale():
    adascale = (1 + 10) / (1 + 10 / 8)
    assert hvdlocal.gain_ratio(1, 10, 8, 64, c=0) == pytest.approx(adascale)
    assert hvdlocal.gain_ratio(1, 10, 8, 1) == pytest.approx(adascale)
    assert hvdlocal.gain_ratio(1, 10, 8, 64) < hvdlocal.gain_ratio(1, 10, 8, 64, c=0.6) < adascale


def test_accumulation_counts_as_workers_when_there_are_no_local_steps():
    assert hvdlocal.gain_ratio(1, 10, 2, 1, accumulate=4) == pytest.approx(hvdlocal.gain_ratio(1, 10, 8, 1))


@pytest.mark.parametrize(
    "bad", [(-1, 1, 2, 1), (1, -1, 2, 1), (0, 0, 2, 1), (1, 1, 0, 1), (1, 1, 2, 0), (math.nan, 1, 2, 1)]
)
def test_gain_refuses_what_has_no_meaning(bad):
    with pytest.raises(ValueError, match="must"):
        hvdlocal.gain_ratio(*bad)


# FairScale's golden values: Linear(2, 2) with bias, loss = sum(out), so that the gradient of an input x is x in both rows of the
# weight and 1 in both biases; two workers, no history.
FAIRSCALE = [
    ([1, 0], [0, 1], 4 / 3),
    ([1, 2], [1, 2], 1.0000001),
    ([-1, 1], [1, -1], 2.0),
    ([1, 4], [5, 0.5], 1.4688796680497926),
    ([-0.2, 3], [5, 0.5], 1.8472893901708),
]


@pytest.mark.parametrize(("first", "second", "gain"), FAIRSCALE)
def test_fairscale_golden_values(first, second, gain):
    gradients = [[*x, *x, 1.0, 1.0] for x in (first, second)]
    mean = [(a + b) / 2 for a, b in zip(*gradients, strict=True)]
    sqr = [sum(v * v for v in g) for g in gradients]
    grad_sqr, grad_var = hvdlocal.gradient_statistics(sum(sqr) / 2, sum(v * v for v in mean), 2)
    smoothed = SmoothedStatistics()
    smoothed.update(grad_sqr, grad_var, theta=0.0)
    assert hvdlocal.gain_ratio(smoothed.grad_sqr, smoothed.grad_var, 2, 1) == pytest.approx(gain, rel=2e-7)


def test_statistics_are_not_clamped_and_agree_with_eq_15():
    # K = 2, g = (1, 0) and (-1, 0): mean zero, Σ‖g‖² = 2.  σ² = 2·(1 − 0) = 2, G = 0 − 2/2 = −1.
    assert hvdlocal.gradient_statistics(1.0, 0.0, 2) == (-1.0, 2.0)
    with pytest.raises(ValueError, match="at least two"):
        hvdlocal.gradient_statistics(1.0, 1.0, 1)


def test_clamping_comes_before_averaging():
    smoothed = SmoothedStatistics()
    smoothed.update(-1.0, 2.0, theta=0.5)
    smoothed.update(3.0, -5.0, theta=0.5)
    # debiased: (0.5·x₁·0.5 + 0.5·x₂) / 0.75 with x = (0, 3) and (2, 1e-6)
    assert smoothed.grad_sqr == pytest.approx(1.5 / 0.75)
    assert smoothed.grad_var == pytest.approx((0.5 + 0.5e-6) / 0.75)


def test_moving_average_is_debiased():
    average = MovingAverage()
    assert average.value is None
    average.update(7.0, 0.992)
    assert average.value == pytest.approx(7.0)
    average.update(9.0, 0.992)
    assert average.value == pytest.approx((0.992 * 7 + 9) / 1.992)


def test_default_smoothing_is_fairscales():
    assert default_smoothing(8) == pytest.approx(0.992)
    assert default_smoothing(5000) == 0.0


def test_linear_scaling_warms_up_over_five_percent_of_the_budget():
    def gain(progress):
        moment = ScalingContext(num_workers=4, accumulate=2, period=1, progress=progress, budget=1000)
        return hvdlocal.LinearScaling().gain(moment)

    assert [gain(0), gain(25), gain(50), gain(900)] == [1, 4.5, 8, 8]
    start = ScalingContext(num_workers=4, accumulate=2, period=1, progress=0, budget=1000)
    assert hvdlocal.LinearScaling().progress(start) == 8, "as many iterations as without a warm-up"
    with pytest.raises(ValueError, match="budget"):
        hvdlocal.LinearScaling().gain(ScalingContext(num_workers=4, accumulate=1, period=1, progress=0, budget=None))


def test_pseudo_wall_clock():
    assert hvdlocal.pseudo_wall_clock(200, 8, 4, 2.0) == pytest.approx(200 / 8 * 1.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: hvdlocal.LocalAdaScale(statistics="vector"),
        lambda: hvdlocal.LocalAdaScale(c=-1),
        lambda: hvdlocal.LocalAdaScale(smoothing=1.0),
        lambda: hvdlocal.LinearScaling(warmup=1.5),
    ],
)
def test_rules_refuse_wrong_settings(make):
    with pytest.raises(ValueError, match=r"."):
        make()
