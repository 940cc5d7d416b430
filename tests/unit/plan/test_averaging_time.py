"""What an overlap hides of a run's averagings, in closed form."""

import pytest

from hvdlocal.averaging import ConstantPeriod, PeriodRule
from hvdlocal.averaging.rounds import plan_rounds
from hvdlocal.plan.averaging_time import AveragingTime
from hvdlocal.plan.forecast import Forecast
from hvdlocal.plan.run_plan import AssumedGain, plan_run
from hvdlocal.plan.text import compare, describe
from hvdlocal.training.config import DataConfig, MethodConfig, ModelConfig, OptimizerConfig, PeriodConfig, TrainConfig

STATISTICS = (1.0, 1.0)


def config(overlap=0, epochs=10.0, preset="local", **period):
    """Ten steps of each of two ranks are an epoch; an evaluation ends every second one."""
    return TrainConfig(
        data=DataConfig(path="x", batch_size=10),
        model=ModelConfig("digits_cnn"),
        output="y",
        epochs=epochs,
        evaluate_every_epochs=2.0,
        optimizer=OptimizerConfig(lr=0.01),
        method=MethodConfig(preset, period=PeriodConfig(**period), overlap=overlap),
    )


def plan(overlap=0, workers=2, **more):
    return plan_run(config(overlap, **more), 200, workers)


@pytest.mark.parametrize(("overlap", "gains"), [(0, [1, 2, 2, 2]), (1, [1, 1, 2, 2]), (9, [1, 1, 2, 2])])
def test_an_overlap_delays_the_first_estimate_by_a_round(overlap, gains):
    """With H = 4 and gain 2, rounds make a progress of 4 and later of 8."""
    rounds = plan_rounds(
        ConstantPeriod(4), lambda _: 0.1, 4 * sum(gains), AssumedGain(2.0), statistics=STATISTICS, overlap=overlap
    )
    assert [one.gain for one in rounds] == gains


@pytest.mark.parametrize(("every", "gains"), [(4.0, [1, 2, 2]), (4.1, [1, 1, 2])])
def test_an_evaluation_waits_for_the_first_estimate(every, gains):
    """With H = 4, the first round ends at a progress of 4, where an evaluation is due or not."""
    rounds = plan_rounds(
        ConstantPeriod(4),
        lambda _: 0.1,
        4 * sum(gains),
        AssumedGain(2.0),
        statistics=STATISTICS,
        overlap=2,
        evaluate_every=every,
    )
    assert [one.gain for one in rounds] == gains


class Growing(PeriodRule):
    """1, 2, 3 … steps."""

    def __init__(self):
        super().__init__()
        self.rounds = 0

    def __call__(self, start):
        self.rounds += 1
        return self.rounds


@pytest.mark.parametrize(
    ("overlap", "every", "steps"),
    [(0, 100.0, [0, 0, 0, 0]), (3, 100.0, [2, 3, 3, 0]), (9, 100.0, [2, 3, 4, 0]), (9, 3.0, [2, 0, 0, 0])],
)
def test_an_average_is_under_way_for_the_next_round_at_most(overlap, every, steps):
    """Rounds of 1, 2, 3 and 4 steps end at 1, 3, 6 and 10; an evaluation every 3 steps ends the second and the third."""
    rounds = plan_rounds(Growing(), lambda _: 0.1, 10.0, overlap=overlap, evaluate_every=every)
    assert [one.overlapped for one in rounds] == steps


@pytest.mark.parametrize(("overlap", "exposed"), [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.0), (4, 0.0)])
def test_a_round_exposes_what_outlasts_the_steps(overlap, exposed):
    """100 steps in 25 rounds of 4, averagings of 3 s, steps of 1 s: all of the last is exposed, and of the 4 before evaluations.

    Evaluations are due after 20, 40, 60 and 80 steps.
    """
    time = AveragingTime.of(plan(overlap, period=4), 3.0, 1.0)
    assert time.exposed == pytest.approx(20 * exposed + 5 * 3.0)
    assert time.exposed + time.hidden == pytest.approx(25 * 3.0)
    assert time.free_from == 3


@pytest.mark.parametrize(
    ("each", "step", "free_from"), [(0.9, 0.3, 3), (0.91, 0.3, 4), (0.1, 0.3, 1), (0.3, 0.1, 3), (2.0, None, None)]
)
def test_the_least_overlap_that_hides_an_averaging(each, step, free_from):
    assert AveragingTime.of(plan(), each, step).free_from == free_from


def test_one_worker_has_no_averaging():
    assert AveragingTime.of(plan(4, workers=1), 3.0, 1.0).exposed == 0


def test_data_parallelism_exposes_every_sum():
    assert AveragingTime.of(plan(preset="sync"), 0.5, 1.0).exposed == pytest.approx(100 * 0.5)


def test_hidden_time_needs_the_time_of_a_step():
    with pytest.raises(ValueError, match="give --step-seconds"):
        AveragingTime.of(plan(2), 3.0)
    assert AveragingTime.of(plan(0), 3.0).hidden == 0


@pytest.mark.parametrize(
    ("each", "said"),
    [
        (3.0, "averaging is free from τ = 3 on (method.overlap)"),
        (5.0, "no τ makes averaging free: it takes 5 steps, and a round has at most 4"),
    ],
)
def test_the_text_says_which_overlap_is_enough(each, said):
    case = plan(2, period=4)
    forecast = Forecast("one", case, step_seconds=1.0, averaging=AveragingTime.of(case, each, 1.0))
    assert said in describe(forecast)
    assert "exposed" in compare([forecast, forecast])
    assert forecast.as_dict()["exposed_seconds"] == pytest.approx(forecast.averaging.exposed)


def test_a_rule_with_short_and_long_rounds():
    """H is 1 in the first five epochs, and 8 later."""
    case = plan(2, rule="post-local", switch_epochs=5.0, period=8)
    text = describe(Forecast("one", case, step_seconds=1.0, averaging=AveragingTime.of(case, 5.0, 1.0)))
    assert "averaging is free from τ = 5 on in rounds of 5 steps or more" in text
