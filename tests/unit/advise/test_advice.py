"""Predictions where the answer is known in closed form."""

import json
import math
import re
import statistics
from dataclasses import replace

import numpy as np
import pytest
from scaling import straggler_factor

from hvdlocal.advise.advice import Estimate, advise, compare, estimate
from hvdlocal.advise.comparison import compare_methods, crossover
from hvdlocal.advise.cost_model import (
    Cost,
    CostModel,
    IslandCost,
    averaging_ratio,
    averaging_seconds,
    predicted_overlap,
)
from hvdlocal.advise.facts import as_dict
from hvdlocal.advise.measurements import (
    Block,
    IslandTimes,
    Measurements,
    SampleSummary,
    StepTimes,
    SyncStepTimes,
    rank_jitter,
    undo_moving_average,
)
from hvdlocal.advise.predictions import PERIODS, predict, slowest, slowest_island
from hvdlocal.advise.text import advice_text
from hvdlocal.averaging.gain import gain_ratio
from hvdlocal.averaging.statistics import MovingAverage
from hvdlocal.plan import pseudo_wall_clock
from hvdlocal.plan.overlap import BucketArrival, SumTime

SERIAL = ("sync", "acc-lin", "acc-ada")
METHODS = (*SERIAL, *(f"{name} overlapped" for name in SERIAL), "local-lin", "local-ada")
BYTES = 4000


def cost_model(m=0.0, noise=1.0, workers=8, **more):
    """Steps of one second, averagings of m."""
    costs = dict.fromkeys(METHODS, Cost(closing=m))
    return CostModel((1.0,) * workers, costs, grad_sqr=1.0, grad_var=noise, **more)


@pytest.mark.parametrize("period", [1, 4, 64])
@pytest.mark.parametrize("m", [0.0, 0.5, 20.0])
def test_without_anything_else_it_is_equation_16(period, m):
    now = cost_model(m, noise=10.0)
    local, accumulated = predict(now, "local-ada", period), predict(now, "acc-ada", period)
    assert local.gain == gain_ratio(1, 10, 8, period)
    assert local.epoch == pytest.approx(pseudo_wall_clock(8 / local.gain, 8, period, m))
    assert accumulated.gain == gain_ratio(1, 10, 8, 1, accumulate=period)
    assert accumulated.epoch == pytest.approx(pseudo_wall_clock(8 * period / accumulated.gain, 8, period, m))
    linear = predict(now, "local-lin", period)
    assert linear.own_epoch == pytest.approx(pseudo_wall_clock(1, 8, period, m)), "always the same number of epochs"
    assert linear.epoch == pytest.approx(local.epoch), "but only as much progress as is justified"


def test_the_parts_of_a_round():
    cost = Cost(closing=7.0, update=0.1, collect=0.01)
    now = cost_model(accumulate=3)
    now = CostModel(now.micro_batch, dict.fromkeys(METHODS, cost), 1.0, 1.0, accumulate=3, epoch=100.0)
    assert predict(now, "local-ada", 4).round == pytest.approx(12 * 1.0 + 8 * 0.01 + 3 * 0.1 + 7.0)
    assert predict(now, "acc-ada", 4).round == pytest.approx(12 * 1.0 + 11 * 0.01 + 7.0)
    sync = predict(now, "sync", 1)
    assert sync.round == pytest.approx(3 * 1.0 + 2 * 0.01 + 7.0)
    assert sync.own_epoch == pytest.approx(100 / (8 * 3) * sync.round)
    assert averaging_ratio(now, "local-ada") == pytest.approx(6.9 / (3 + 0.02 + 0.1))


@pytest.mark.parametrize("noise", [0.0, 0.3, 10.0, 1000.0])
def test_free_averagings_make_local_steps_pointless(noise):
    now = cost_model(0.0, noise)
    result = compare_methods(now)
    assert result.verdict == "data-parallel" or noise == 0
    assert result.ratio >= 1
    assert result.data_parallel.period == 1
    assert min(predict(now, "local-ada", period).epoch for period in PERIODS) == predict(now, "local-ada", 1).epoch


@pytest.mark.parametrize("noise", [0.3, 10.0])
def test_endless_averagings_want_the_longest_rounds(noise):
    result = compare_methods(cost_model(1e9, noise))
    assert result.verdict == "local"
    assert result.local.period == PERIODS[-1]


def test_a_round_beats_a_step_of_as_many_micro_batches_from_a_known_noise_on():
    """At one H, progress of H local steps against that of one step on H micro-batches: H > (3/4 − 1/K) σ²/G."""
    for workers in (2, 8, 24):
        for period in (2, 16, 64):
            even = period / (0.75 - 1 / workers)
            for noise, better in ((0.99 * even, True), (1.01 * even, False)):
                round_progress = period * gain_ratio(1, noise, workers, period)
                step_progress = gain_ratio(1, noise, workers, 1, accumulate=period)
                assert (round_progress > step_progress) is better


def test_crossover_in_closed_form():
    """K = 8, σ²/G = 1: (1 + m)/1.777778 of sync meets (2 + m)/(2 · 1.253785) of H = 2."""
    assert crossover(1.0, 8, periods=(1, 2)) == pytest.approx(1.436, abs=1e-3)
    m = crossover(1.0, 8)
    assert compare_methods(cost_model(0.99 * m)).ratio > 1 > compare_methods(cost_model(1.01 * m)).ratio
    assert crossover(math.inf, 8) is None, "without a mean gradient every local step is as good as data parallelism's"


def test_the_slowest_rank():
    assert slowest([1.0, 1.5], 0.0, 4) == pytest.approx(6)
    assert slowest([2.0], 0.3, 4) == pytest.approx(8), "nobody to wait for"
    for count in (1, 16):
        expected = straggler_factor(8, count, 0.05, rounds=4000) * count
        assert slowest([1.0] * 8, 0.05, count) == pytest.approx(expected, rel=0.005)
    assert slowest([1.0, 3.0], 0.1, 64) == pytest.approx(192, rel=1e-3), "a rank that is always slow"


# -- overlap and islands ------------------------------------------------------------------------------------------------


def with_islands(average, sum_inside=0.0, noise=10.0, m=4.0, backward=0.0):
    """Eight ranks whose islands of two and four sum a gradient in this time, and average in that."""
    islands = {1: IslandCost(SumTime(0.0, 0.0), m)}
    islands |= {n: IslandCost(SumTime(0.0, sum_inside / BYTES), average) for n in (2, 4)}
    islands |= {8: IslandCost(SumTime(0.0, m / BYTES), 0.0)}
    buckets = [BucketArrival(0.5, BYTES // 2), BucketArrival(1.0, BYTES // 2)]
    now = cost_model(m, noise, islands=islands, buckets=buckets, backward=backward)
    costs = dict.fromkeys(METHODS, Cost(closing=m, collective=m))
    return replace(now, costs=costs)


def test_overlap_of_one_bucket_is_the_step_without_overlap():
    now = replace(with_islands(0.0, backward=0.5), buckets=[BucketArrival(1.0, BYTES)])
    assert predicted_overlap(now, "sync") == pytest.approx(now.costs["sync"].closing)


@pytest.mark.parametrize(("backward", "exposed"), [(0.0, 4.0), (1.0, 3.5), (100.0, 2.0)])
def test_overlap_leaves_what_the_backward_pass_does_not_hide(backward, exposed):
    """Two buckets of 2 s each, the first of which is complete after half of the backward pass."""
    assert predicted_overlap(with_islands(0.0, backward=backward), "sync") == pytest.approx(exposed)


@pytest.mark.parametrize("island", [2, 4])
@pytest.mark.parametrize("period", [2, 16])
def test_islands_in_closed_form(island, period):
    now = with_islands(average=3.0, sum_inside=0.25)
    one = predict(now, "local-ada", period, island)
    assert one.round == pytest.approx(period * (1 + 0.25) + 3.0)
    assert one.gain == gain_ratio(1, 10, 8 // island, period, accumulate=island)
    assert one.epoch == pytest.approx((1.25 + 3.0 / period) / one.gain)
    assert averaging_seconds(now, "local-ada", island) == pytest.approx(3.0)
    linear = predict(now, "local-lin", period, island)
    assert linear.own_epoch == pytest.approx((1.25 + 3.0 / period) / 8), "an epoch of data: all ranks read it"


def test_an_island_accumulates_micro_batches_too():
    one = predict(replace(with_islands(3.0, 0.25), accumulate=3), "local-ada", 4, 2)
    assert one.round == pytest.approx(4 * (3 + 0.25) + 3.0)
    assert one.gain == gain_ratio(1, 10, 4, 4, accumulate=6)


def test_islands_of_one_rank_are_no_islands():
    now = with_islands(3.0)
    assert predict(now, "local-ada", 4, 1) == predict(replace(now, islands={}), "local-ada", 4)


def test_the_ranks_of_an_island_wait_at_every_step():
    """Step times are 1, 2, 1, 2 …: every island steps with its slower rank."""
    now = replace(with_islands(3.0), micro_batch=(1.0, 2.0) * 4)
    assert predict(now, "local-ada", 8, 2).round == pytest.approx(8 * 2 + 3.0)
    sorted_ranks = replace(now, micro_batch=(1.0,) * 4 + (2.0,) * 4)
    assert predict(sorted_ranks, "local-ada", 8, 4).round == pytest.approx(8 * 2 + 3.0)
    together = slowest_island([1.0] * 8, 0.05, 1, 1, 8)
    assert together == pytest.approx(slowest([1.0] * 8, 0.05, 1), rel=1e-6), "one island of all waits as one round does"


def test_free_sums_inside_and_dear_averages_want_large_islands():
    """Averages are equally dear: at no cost a step of an island makes more progress than one of a rank."""
    best = compare_methods(with_islands(average=50.0, m=50.0))
    assert best.local.island == 4
    assert best.verdict == "local"


def test_dear_sums_inside_want_no_islands():
    best = compare_methods(with_islands(average=50.0, sum_inside=50.0, m=50.0))
    assert best.local.island == 1


def test_overlap_moves_the_crossover():
    """As above, but a step hides 0.5: (0.5 + m)/1.777778 of sync meets (2 + m)/(2 · 1.253785) of H = 2."""
    found = crossover(1.0, 8, periods=(1, 2), exposed=lambda m: max(m - 0.5, 0.0))
    assert found == pytest.approx((1 / 1.253785 - 0.5 / 1.777778) / (1 / 1.777778 - 0.5 / 1.253785), rel=1e-4)


# -- from measurements -------------------------------------------------------------------------------------------------


def measurements(
    averagings=(0.5, 0.5, 0.5), steps=(1.0, 1.0, 1.0), noise=(10.0, 10.0, 10.0), grad_sqr=1.0, hidden=0.0, inside=0.01
):
    """Four ranks on one node; a share of the sum of the gradient is hidden by a backward pass of 0.6 of a step."""
    none = SampleSummary.of([])
    blocks = []
    for averaging, step, var in zip(averagings, steps, noise, strict=True):
        pace = StepTimes(
            SampleSummary(step, 0.05, 10),
            SampleSummary(0.01, count=10),
            SampleSummary(0.1, count=10),
            none,
            SampleSummary(0.6 * step, count=10),
        )
        closing = SyncStepTimes(
            BYTES, SampleSummary(averaging + 0.1, count=10), SampleSummary(averaging, count=10), none
        )
        overlapped = SyncStepTimes(BYTES, SampleSummary((1 - hidden) * averaging + 0.1, count=10), none, none)
        names = ("acc-lin", "acc-ada", "local-lin", "local-ada sketch", "local-ada exact")
        closings = dict.fromkeys(names, closing)
        closings |= {f"{name} overlapped": overlapped for name in ("acc-lin", "acc-ada")}
        nothing, whole = SampleSummary(0.0, count=10), SampleSummary(averaging, count=10)
        islands = {
            1: IslandTimes(none, none, whole),
            2: IslandTimes(nothing, SampleSummary(inside, count=10), SampleSummary(averaging / 2, count=10)),
            4: IslandTimes(nothing, whole, none),
        }
        blocks.append(
            Block(
                (pace,) * 4,
                SampleSummary(0.0, 0.05, 9),
                closings,
                islands,
                SampleSummary(grad_sqr, count=10),
                SampleSummary(var, count=10),
            )
        )
    buckets = (BucketArrival(0.5, BYTES // 2), BucketArrival(1.0, BYTES // 2))
    return Measurements(1, 32, 3200, 100.0, 1000, buckets, tuple(blocks), epochs=0.5, seconds=60.0)


def test_a_situation_from_blocks():
    now = estimate(measurements(averagings=(0.4, 0.5, 0.6)), c=1.0, statistics="sketch").cost_model
    assert now.micro_batch == (1.0,) * 4
    assert now.costs["local-ada"] == Cost(pytest.approx(0.6), pytest.approx(0.1), 0.0, pytest.approx(0.5))
    assert now.variation == pytest.approx(0.05)
    assert averaging_ratio(now, "local-ada") == pytest.approx(0.5 / 1.1)


def test_the_error_of_a_mean_is_the_standard_error():
    found = estimate(measurements(averagings=(0.4, 0.5, 0.9)), c=1.0, statistics="sketch")
    expected = statistics.stdev((0.4, 0.5, 0.9)) / math.sqrt(3)
    assert found.error(lambda now: now.costs["sync"].closing) == pytest.approx(expected)


def test_what_slows_down_everything_alike_is_no_doubt():
    together = advise(measurements(averagings=(5.0, 10.0, 20.0), steps=(0.9, 1.9, 3.9)))
    apart = advise(measurements(averagings=(5.0, 10.0, 20.0), steps=(3.9, 1.9, 0.9)))
    assert together.now.error < 0.05 < apart.now.error


def test_no_winner_within_the_noise():
    now = cost_model(0.99 * crossover(1.0, 8))
    assert compare(Estimate(now)).verdict == "data-parallel"
    doubtful = Estimate(now, [cost_model(0.8 * crossover(1.0, 8)), cost_model(1.2 * crossover(1.0, 8))])
    assert compare(doubtful).verdict == "undecided"


@pytest.mark.parametrize(
    ("averaging", "said"), [(0.0, "USE DATA PARALLELISM"), (50.0, "USE LOCAL SGD: local-ada, H = ")]
)
def test_the_verdict_comes_first(averaging, said):
    text = advice_text(advise(measurements(averagings=(averaging,) * 3)))
    assert text.startswith(said)
    assert "σ²/G = 10" in text


def test_the_table_has_aligned_columns():
    """Rates that are hundreds of times too large are written out, with a space before them."""
    text = advice_text(advise(measurements(grad_sqr=1e6, averagings=(1e-5, 1e-5, 1e-5))))
    table = text[text.index("     H ") :].splitlines()[1 : len(PERIODS) + 1]
    assert re.fullmatch(r" +128( +[\d.]+ ± [\d.e-]+ +[\d.]+)+( +[\d.]+ +\([\d.]+×\)){2}", table[-1]), table[-1]
    assert len({len(line) for line in table[-3:]}) == 1


@pytest.mark.parametrize(
    ("inside", "said"), [(0.01, "Islands of 2 ranks pay"), (30.0, "Islands do not pay here"), (None, None)]
)
def test_the_text_says_whether_islands_pay(inside, said):
    measured = measurements(averagings=(6.0,) * 3, inside=inside or 0.0)
    if said is None:
        blocks = tuple(replace(block, islands={n: block.islands[n] for n in (1, 4)}) for block in measured.blocks)
        text = advice_text(advise(replace(measured, blocks=blocks)))
        assert "slands" not in text
    else:
        text = advice_text(advise(measured))
        assert said in text
        assert ("method.island: 2" in text) is (inside < 1)


def test_the_stronger_data_parallelism_is_the_baseline():
    without = advise(measurements(averagings=(1.0,) * 3, noise=(1.0,) * 3))
    overlapped = advise(measurements(averagings=(1.0,) * 3, noise=(1.0,) * 3, hidden=0.6))
    slower = advise(measurements(averagings=(1.0,) * 3, noise=(1.0,) * 3, hidden=-1.0))
    assert overlapped.now.data_parallel.method == "sync overlapped"
    assert overlapped.now.ratio > without.now.ratio
    assert slower.now == without.now
    assert overlapped.crossover > crossover(1.0, 4), "what is hidden needs no local steps"
    assert as_dict(overlapped)["overlap"]["sync"] == {
        "without": pytest.approx(1.1),
        "overlapped": pytest.approx(0.5),
        "predicted": pytest.approx(0.1 + 1.0 - 0.3),
    }


def test_the_table_has_the_faster_of_each_method_with_overlap_and_without():
    measured = measurements(hidden=-1.0)
    slow = SyncStepTimes(BYTES, SampleSummary(9.0, count=10), SampleSummary(8.0, count=10), SampleSummary.of([]))
    blocks = [replace(block, closings={**block.closings, "acc-ada": slow}) for block in measured.blocks]
    head = next(line for line in advice_text(advise(replace(measured, blocks=blocks))).splitlines() if "gain  " in line)
    assert head.split() == ["H", "acc-ada", "overlapped", "gain", "local-ada", "gain", "acc-lin", "local-lin"]


def test_gradients_that_are_nothing_but_noise():
    advice = advise(measurements(grad_sqr=0.0, averagings=(3.0, 3.0, 3.0)))
    assert advice.table["local-ada", 64].gain == pytest.approx(4)
    assert "∞" in advice_text(advice)
    json.dumps(as_dict(advice), allow_nan=False)


def test_single_estimates_come_back_from_moving_averages():
    average, estimates, seen = MovingAverage(), [3.0, 0.0, 7.5, 1.25], []
    for one in estimates:
        average.update(one, 0.992)
        seen.append(average.value)
    assert undo_moving_average(seen, 0.992) == pytest.approx(estimates)
    assert undo_moving_average(seen, 0.992)[1] == 0
    assert undo_moving_average([1.0, 2.0], 0.0) == [1.0, 2.0]


def test_pooling():
    whole = SampleSummary.pooled([SampleSummary(1.0, 0.1, 10), SampleSummary(4.0, 0.1, 20), SampleSummary.of([])])
    assert whole == SampleSummary(pytest.approx(3.0), pytest.approx(0.1), 30)


def test_what_ranks_share_is_no_reason_to_wait():
    busy = [4.0, 8.0, 5.0, 40.0]
    slower = [seconds + 1 for seconds in busy]
    assert rank_jitter([busy, slower], 4).deviation == pytest.approx(0, abs=1e-9)
    random = np.random.default_rng(0)
    own = random.normal(1.0, 0.1, (3, 4000, 4)).sum(2)
    assert rank_jitter((own + random.normal(0, 5, 4000)).tolist(), 4).deviation == pytest.approx(0.1, rel=0.03)
    assert rank_jitter([[1.0, 2.0]], 1).count == 0
