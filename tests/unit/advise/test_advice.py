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
    OverlapCost,
    averaging_ratio,
    averaging_seconds,
    least_overlap,
    predicted_overlap,
)
from hvdlocal.advise.facts import as_dict
from hvdlocal.advise.measurements import (
    Block,
    IslandTimes,
    Measurements,
    OverlapTimes,
    SampleSummary,
    StepTimes,
    SyncStepTimes,
    rank_jitter,
    undo_moving_average,
)
from hvdlocal.advise.overlap import OverlapComparison
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


# -- averages behind steps ----------------------------------------------------------------------------------------------


def with_overlap(m, gained=1.0, own_work=0.0, **more):
    """Steps of one second, averagings of m, which steps hide."""
    costs = dict.fromkeys(METHODS, Cost(closing=m, collective=m))
    return replace(cost_model(m, **more), costs=costs, overlap=OverlapCost(gained, own_work))


@pytest.mark.parametrize("period", [4, 16])
@pytest.mark.parametrize("overlap", [1, 4, 9])
@pytest.mark.parametrize("m", [0.0, 0.5, 4.0, 20.0])
def test_a_round_exposes_what_its_steps_do_not_hide(m, overlap, period):
    one = predict(with_overlap(m), "local-ada", period, overlap=overlap)
    assert one.round == pytest.approx(period + max(0.0, m - min(overlap, period)))
    assert one.gain == predict(with_overlap(m), "local-ada", period).gain


def test_overlap_gains_a_factor_of_two_at_most():
    """At m = H and τ = H."""
    for m in (1.0, 7.0, 8.0, 9.0, 100.0):
        late, now = (predict(with_overlap(m), "local-lin", 8, overlap=overlap).round for overlap in (8, 0))
        assert now / late == pytest.approx((8 + m) / (8 + max(0.0, m - 8)))
        assert now / late <= 2.0


def test_steps_beside_an_average_may_be_slower():
    one = predict(with_overlap(2.0, gained=0.75, own_work=0.125), "local-ada", 4, overlap=1)
    assert one.round == pytest.approx(4 + 2.0 - 0.75 * 1 + 0.125)


def test_islands_average_behind_steps_too():
    """The average across islands takes 3 s, of which a step hides 1."""
    now = replace(with_islands(average=3.0, sum_inside=0.25), overlap=OverlapCost(1.0))
    assert predict(now, "local-ada", 4, 2, overlap=1).round == pytest.approx(4 * 1.25 + 3.0 - 1.0)


@pytest.mark.parametrize(("collective", "overlap"), [(0.0, 1), (0.5, 1), (1.0, 2), (5.0, 6), (5.1, 7)])
def test_the_least_overlap_has_a_margin_of_a_fifth(collective, overlap):
    assert least_overlap(collective, 1.0) == overlap


@pytest.mark.parametrize(("share", "verdict"), [(0.05, "little"), (0.099, "little"), (0.11, "pays"), (0.5, "pays")])
def test_overlap_pays_from_a_tenth_of_a_round_on(share, verdict):
    """With m/H = 0.1 a round is 1.1 times as long without overlap as with it."""
    now = with_overlap(8 * share)
    found = OverlapComparison({8: predict(now, "local-lin", 8, overlap=8)}, {8: predict(now, "local-lin", 8)})
    assert found.ratio == pytest.approx(1 / (1 + share))
    assert found.verdict == verdict
    assert replace(found, error=0.3).verdict == "undecided"


def test_overlap_that_costs_more_than_it_hides_is_no_gain():
    now = with_overlap(0.1, gained=-3.0)
    found = OverlapComparison({8: predict(now, "local-lin", 8, overlap=1)}, {8: predict(now, "local-lin", 8)}, 0.001)
    assert found.ratio > 1
    assert found.verdict == "little"


# -- from measurements -------------------------------------------------------------------------------------------------


def measurements(
    averagings=(0.5, 0.5, 0.5),
    steps=(1.0, 1.0, 1.0),
    noise=(10.0, 10.0, 10.0),
    grad_sqr=1.0,
    hidden=0.0,
    inside=0.01,
    beyond=0.0,
    own_work=0.0,
):
    """Four ranks on one node; a share of the sum of the gradient is hidden by a backward pass of 0.6 of a step.

    Thirty steps beside an average take `beyond` averages longer than alone. An outer optimizer adds 0.02.
    """
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
        closings["local-lin outer"] = replace(closing, step=SampleSummary(averaging + 0.12, count=10))
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
                OverlapTimes(30, SampleSummary(beyond * averaging, count=10), SampleSummary(own_work, count=10)),
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


def test_the_cost_of_overlap_from_blocks():
    """Of an averaging of 0.5, hidden by 30 steps, a fifth is lost; 0.03 is own work. Closings have none without overlap."""
    now = estimate(measurements(beyond=0.2, own_work=0.03), c=1.0, statistics="sketch").cost_model
    assert now.overlap == OverlapCost(pytest.approx(0.8), pytest.approx(0.03))
    assert now.outer == pytest.approx(0.02)
    without, late = (predict(now, "local-ada", 4, overlap=overlap).round for overlap in (0, 1))
    assert without - late == pytest.approx(0.8 * 0.5 - 0.03)


def test_an_average_that_no_trial_hides_wholly():
    """30 steps of 1.1 hide 33 of 50 seconds, and 20 are left."""
    now = estimate(measurements(averagings=(50.0,) * 3, beyond=0.4), c=1.0, statistics="sketch").cost_model
    assert now.overlap.gained == pytest.approx(30 / 33)


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


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ((0.02, 0.02, 0.02), "adds 20 ms ± 0 to an average"),
        ((-0.02, -0.02, -0.02), "adds less to an average than the noise of ± 0 ms shows"),
        ((0.3, 0.0, -0.24), "adds less to an average than the noise of ± 156 ms shows"),  # a mean of 20 ms
    ],
)
def test_an_outer_optimizer_that_the_noise_hides(added, said):
    measured = measurements()
    blocks = []
    for block, seconds in zip(measured.blocks, added, strict=True):
        plain = block.closings["local-lin"]
        outer = replace(plain, step=replace(plain.step, mean=plain.step.mean + seconds))
        blocks.append(replace(block, closings=dict(block.closings) | {"local-lin outer": outer}))
    assert said in advice_text(advise(replace(measured, blocks=tuple(blocks))))


def test_a_model_that_allows_no_outer_optimizer():
    measured = measurements()
    blocks = [
        replace(block, closings={name: one for name, one in block.closings.items() if name != "local-lin outer"})
        for block in measured.blocks
    ]
    advice = advise(replace(measured, blocks=tuple(blocks)))
    assert as_dict(advice)["outer_seconds"] is None
    assert "outer optimizer" not in advice_text(advice)


@pytest.mark.parametrize(
    ("averaging", "beyond", "said"),
    [
        (3.0, 0.0, "Overlap pays: set method.overlap: 4 and method.period.period: 4, with another preset"),
        (0.05, 0.0, "too little for two more copies of what is averaged. Leave method.overlap at 0."),
        (3.0, 1.5, "too little for two more copies of what is averaged. Leave method.overlap at 0."),
    ],
)
def test_the_text_says_whether_overlap_pays(averaging, beyond, said):
    """An averaging of 3 takes 3/1.1 steps: with a margin of a fifth, 4 steps."""
    advice = advise(measurements(averagings=(averaging,) * 3, beyond=beyond))
    assert said in advice_text(advice)
    assert "Nesterov's adds 20 ms" in advice_text(advice)
    found = as_dict(advice)["averaging_overlap"]
    assert found["verdict"] == advice.overlap.verdict
    assert {one["period"]: one["overlap"] for one in found["predictions"]} == {
        period: min(period, 4 if averaging == 3.0 else 1) for period in PERIODS[1:]
    }


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
