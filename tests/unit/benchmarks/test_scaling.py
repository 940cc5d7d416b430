"""The cost model in its limits, which are known in closed form."""

import math

import pytest
from scaling import (
    Link,
    allreduce_seconds,
    doubling_seconds,
    exposed_steps,
    gather_seconds,
    halving_seconds,
    least_period,
    ring_seconds,
    sliced_seconds,
    straggler_factor,
    utilisation,
)

LINK = Link(latency_seconds=1e-5, bytes_per_second=1e9)
ALGORITHMS = [ring_seconds, doubling_seconds, halving_seconds]


@pytest.mark.parametrize("seconds", [*ALGORITHMS, allreduce_seconds])
def test_one_worker_sends_nothing(seconds):
    assert seconds(1e9, 1, LINK) == 0


@pytest.mark.parametrize("seconds", ALGORITHMS)
def test_two_workers_exchange_everything_once(seconds):
    messages = {doubling_seconds: 1}.get(seconds, 2)
    assert seconds(1e6, 2, LINK) == pytest.approx(messages * 1e-5 + 1e-3)


def test_latency_and_bandwidth_with_many_workers():
    assert ring_seconds(0, 16384, LINK) == pytest.approx(2 * 16383 * 1e-5)
    assert doubling_seconds(0, 16384, LINK) == pytest.approx(14e-5)
    assert halving_seconds(0, 16384, LINK) == pytest.approx(28e-5)
    free = Link(0, 1e9)
    assert ring_seconds(1e9, 16384, free) == pytest.approx(2 * 16383 / 16384)
    assert halving_seconds(1e9, 16384, free) == pytest.approx(ring_seconds(1e9, 16384, free))
    assert doubling_seconds(1e9, 16384, free) == pytest.approx(14)
    assert doubling_seconds(0, 9, LINK) == pytest.approx(4e-5), "nine need as many levels as sixteen"


def test_the_best_algorithm_depends_on_the_length():
    assert allreduce_seconds(4, 64, LINK) == doubling_seconds(4, 64, LINK)
    assert allreduce_seconds(1e9, 64, LINK) == halving_seconds(1e9, 64, LINK)


def test_a_gather_is_half_an_allreduce():
    assert gather_seconds(1e6, 8, LINK) == pytest.approx(ring_seconds(1e6, 8, LINK) / 2)
    assert gather_seconds(1e6, 1, LINK) == 0


def test_slices_with_a_card_per_rank_are_as_many_small_allreduces():
    """Two islands of four ranks: 1 MB in slices of 250 kB across, then three quarters of it inside."""
    inside = Link(0, 1e10)
    one_card, four_cards = (sliced_seconds(1e6, 2, 4, inside, Link(0, 1e9), cards) for cards in (1, 4))
    assert four_cards == pytest.approx(250e-6 + 75e-6)
    assert one_card == pytest.approx(1000e-6 + 75e-6), "four slices share a card"


def test_one_rank_has_no_slices_and_one_island_nothing_to_average():
    assert sliced_seconds(1e6, 8, 1, LINK, LINK) == allreduce_seconds(1e6, 8, LINK)
    assert sliced_seconds(1e6, 1, 8, LINK, LINK) == gather_seconds(1e6, 8, LINK)


def test_nobody_waits_without_variation_or_alone():
    assert straggler_factor(64, 3, 0) == pytest.approx(1)
    assert straggler_factor(1, 5, 0.2, rounds=2000) == pytest.approx(1, abs=0.01)


def test_the_slower_of_two():
    """For a small variation v, log-normal is normal: E max of two is 1 + v/√π."""
    assert straggler_factor(2, 1, 0.05, rounds=20000) == pytest.approx(1 + 0.05 / math.sqrt(math.pi), abs=0.002)


def test_the_wait_falls_with_the_root_of_the_period():
    waits = [straggler_factor(128, period, 0.1, rounds=1000) - 1 for period in (1, 4, 16)]
    assert waits[0] / waits[1] == pytest.approx(2, rel=0.1)
    assert waits[1] / waits[2] == pytest.approx(2, rel=0.1)


def test_overlap_hides_as_many_steps_as_there_are():
    assert [exposed_steps(3.6, 16, overlap) for overlap in (0, 1, 4)] == pytest.approx([3.6, 2.6, 0])
    assert exposed_steps(3.6, 2, 16) == pytest.approx(1.6), "the next round has two steps only"
    assert exposed_steps(3.6, 2, math.inf) == pytest.approx(1.6)


def test_utilisation_is_computing_over_everything():
    assert utilisation(16, 16) == 1 / 2
    assert utilisation(16, 16, math.inf) == 1, "twice as fast, which is the most that overlap gains: at m = H"
    assert utilisation(45, 16) == pytest.approx(16 / 61)
    assert utilisation(45, 16, math.inf) == pytest.approx(16 / 45)


@pytest.mark.parametrize("m", [0, 0.05, 1, 3.98, 5, 15.4, 154])
@pytest.mark.parametrize("wanted", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("overlap", [0, 1, 5, math.inf])
def test_no_smaller_period_computes_as_much(m, wanted, overlap):
    enough = [period for period in range(1, 20_000) if utilisation(m, period, overlap) >= wanted - 1e-12]
    assert least_period(m, wanted, overlap) == enough[0]


def test_the_period_for_nine_tenths():
    """H ≥ (m − τ) · 0.9/0.1; and H ≥ 0.9 m where a whole round hides the average."""
    assert [least_period(10.1, 0.9, overlap) for overlap in (0, 5, math.inf)] == [91, 46, 10]


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: ring_seconds(1, 0, LINK),
        lambda: Link(-1, 1),
        lambda: Link(0, 0),
        lambda: straggler_factor(2, 0, 0.1),
        lambda: straggler_factor(2, 1, -0.1),
        lambda: exposed_steps(-1, 1),
        lambda: utilisation(1, 0),
        lambda: least_period(1, 1.0),
    ],
)
def test_mistakes(mistake):
    with pytest.raises(ValueError, match=r"at least|must"):
        mistake()
