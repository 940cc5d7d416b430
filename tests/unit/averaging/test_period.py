"""Periods against the papers' numbers."""

import math

import pytest

import hvdlocal
from hvdlocal.averaging.period import RoundStart
from hvdlocal.averaging.rounds import plan_rounds


def cosine(peak, warmup, steps, low=1e-6):
    def lr(step):
        if step < warmup:
            return low + (peak - low) * step / warmup
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    return lr


@pytest.mark.parametrize(
    ("lr", "period"), [(0.008, 4), (0.006, 8), (0.004, 19), (0.002, 76), (0.001, 306), (0.0005, 1225)]
)
def test_qsr_check_values(lr, period):
    assert hvdlocal.QSR(alpha=0.0175, h_base=4)(RoundStart(lr=lr)) == period


def test_qsr_vit_b_run_has_the_published_rounds():
    rule = hvdlocal.QSR(alpha=0.0175, h_base=4, warmup=10_000, warmup_lr=0.008)
    rounds = list(plan_rounds(rule, cosine(0.008, 10_000, 93_600), 93_600))
    assert len(rounds) == 9_711
    assert [r.period for r in rounds[-3:]] == [1_612, 2_769, 8_142]
    assert rounds[-1].start + rounds[-1].period == 93_600


@pytest.mark.parametrize(
    ("peak", "warmup", "steps", "h_base", "alpha", "share"),
    [
        (0.008, 10_000, 93_600, 4, 0.0175, 10.4),
        (0.008, 10_000, 93_600, 8, 0.0175, 6.9),
        (0.8, 5 * 312, 200 * 312, 2, 0.2, 39.7),
        (0.8, 5 * 312, 200 * 312, 4, 0.25, 20.1),
    ],
)
def test_qsr_communication_shares(peak, warmup, steps, h_base, alpha, share):
    rule = hvdlocal.QSR(alpha=alpha, h_base=h_base, warmup=warmup, warmup_lr=peak)
    rounds = list(plan_rounds(rule, cosine(peak, warmup, steps), steps))
    assert round(100 * len(rounds) / steps, 1) == share


def test_warmup_takes_the_period_that_follows_it():
    rule = hvdlocal.QSR(alpha=0.2, h_base=1, warmup=100, warmup_lr=0.1)
    assert rule(RoundStart(lr=0.001, progress=99)) == 4
    assert rule(RoundStart(lr=0.001, progress=100)) == 40_000


def test_power_rule_exponents_and_cap():
    assert hvdlocal.PowerRule(0.3, 1, 1.0)(RoundStart(lr=0.1)) == 3
    assert hvdlocal.PowerRule(0.4, 1, 3.0)(RoundStart(lr=0.1)) == 64
    assert hvdlocal.QSR(alpha=1.0, h_base=2, max_period=50)(RoundStart(lr=0.001)) == 50
    assert hvdlocal.QSR(alpha=1.0, h_base=2, max_period=50)(RoundStart(lr=0.0)) == 50
    with pytest.raises(ValueError, match="max_period"):
        hvdlocal.QSR(alpha=1.0, h_base=2)(RoundStart(lr=0.0))


def test_whole_ratios_are_not_rounded_down():
    assert hvdlocal.QSR(alpha=0.6, h_base=1)(RoundStart(lr=0.2)) == 9
    assert hvdlocal.QSR(alpha=1.0, h_base=1, max_period=7)(RoundStart(lr=1e-200)) == 7


def test_during_warmup_the_gain_counts():
    rule = hvdlocal.QSR(alpha=0.4, h_base=1, warmup=100, warmup_lr=0.1)
    assert rule(RoundStart(lr=0.02, gain=2.0, progress=0)) == 4


def test_post_local_switches_at_its_progress():
    rule = hvdlocal.PostLocal(switch=150, period=16)
    assert [rule(RoundStart(lr=0.1, progress=s)) for s in (0, 149.9, 150, 300)] == [1, 1, 16, 16]


def test_adacomm():
    rule = hvdlocal.AdaComm(first_period=10, max_period=16)
    assert rule(RoundStart(lr=0.1)) == 10
    # loss fell to a quarter at the same rate: half the period; the rate fell to a quarter as well: the first period again
    assert rule(RoundStart(lr=0.1, loss=0.5, max_lr=0.1, first_loss=2.0)) == 5
    assert rule(RoundStart(lr=0.025, loss=0.5, max_lr=0.1, first_loss=2.0)) == 10
    assert rule(RoundStart(lr=0.001, loss=2.0, max_lr=0.1, first_loss=2.0)) == 16
    with pytest.raises(ValueError, match="loss"):
        list(plan_rounds(rule, lambda step: 0.1, 10))


@pytest.mark.parametrize(
    "make",
    [
        lambda: hvdlocal.ConstantPeriod(0),
        lambda: hvdlocal.ConstantPeriod(4, max_period=0),
        lambda: hvdlocal.QSR(alpha=0, h_base=4),
        lambda: hvdlocal.QSR(alpha=0.1, h_base=0),
        lambda: hvdlocal.QSR(alpha=0.1, h_base=1, warmup=10),
        lambda: hvdlocal.PowerRule(0.1, 1, -1.0),
        lambda: hvdlocal.PostLocal(switch=-1, period=2),
        lambda: hvdlocal.AdaComm(0),
        lambda: hvdlocal.ConstantPeriod(math.nan),
        lambda: hvdlocal.ConstantPeriod(2.5),
        lambda: hvdlocal.ConstantPeriod("4"),
        lambda: hvdlocal.QSR(alpha=0.1, h_base=2.5),
        lambda: hvdlocal.QSR(alpha=0.1, h_base=2, max_period=2.5),
        lambda: hvdlocal.QSR(alpha=math.inf, h_base=2),
        lambda: hvdlocal.QSR(alpha=0.1, h_base=1, warmup=10, warmup_lr=math.nan),
        lambda: hvdlocal.PostLocal(switch=math.nan, period=2),
    ],
)
def test_rules_refuse_wrong_settings(make):
    with pytest.raises(ValueError, match=r"must|belong|at least|progress"):
        make()


def test_a_round_is_at_most_100_times_as_long_as_the_longest_so_far():
    """A rate that falls to a tenth, as in a step schedule, stays within it: (0.5/0.03)² = 277 after (0.5/0.3)² = 2."""
    rule = hvdlocal.QSR(alpha=0.5, h_base=1)
    assert rule(RoundStart(lr=0.3, longest=0)) == 2
    assert rule(RoundStart(lr=0.03, longest=2)) == 277
    assert rule(RoundStart(lr=0.0003, longest=277)) == 100 * 278
    assert rule(RoundStart(lr=0.0003)) == 2_777_777  # no rounds are counted
    assert hvdlocal.QSR(alpha=0.5, h_base=1, max_period=10**6)(RoundStart(lr=0.0003, longest=2)) == 10**6
    assert hvdlocal.PowerRule(0.5, 7, 1.0)(RoundStart(lr=1e-9, longest=0)) == 10 * 8
    assert hvdlocal.ConstantPeriod(10**6)(RoundStart(lr=1e-9, longest=0)) == 10**6


def test_a_round_of_adacomm_is_at_most_100_times_as_long_as_the_longest_so_far():
    start = RoundStart(lr=1e-12, loss=1.0, max_lr=0.1, first_loss=1.0, longest=10)
    assert hvdlocal.AdaComm(first_period=10)(start) == 100 * 11
