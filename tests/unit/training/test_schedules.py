"""Base learning rates at chosen points."""

import math

import pytest

from hvdlocal.training.config import ScheduleConfig
from hvdlocal.training.schedules import build_schedule


def at(points, **settings):
    """Rates of a run of 100 iterations, 10 epochs of 10, with the peak 0.4."""
    schedule = build_schedule(ScheduleConfig(**settings), 0.4, 100, 10)
    return [pytest.approx(schedule(s), abs=1e-12) for s in points]


def test_constant():
    assert at((0, 50, 100), name="constant") == [0.4, 0.4, 0.4]


def test_cosine():
    assert at((0, 25, 50, 100), name="cosine", final_lr=0.2) == [0.4, 0.3 + 0.1 * math.cos(math.pi / 4), 0.3, 0.2]


def test_linear():
    assert at((0, 25, 100), name="linear", final_lr=0.1) == [0.4, 0.325, 0.1]


def test_step():
    settings = {"name": "step", "step_epochs": 3, "step_factor": 0.5}
    assert at((0, 29.9, 30, 59, 60, 99), **settings) == [0.4, 0.4, 0.2, 0.2, 0.1, 0.05]


def test_warmup_rises_from_the_final_rate_and_the_rest_follows_after_it():
    points = (0, 10, 20, 60, 100)
    assert at(points, name="cosine", warmup_epochs=2, final_lr=0.1) == [0.1, 0.25, 0.4, 0.25, 0.1]
    assert at(points, name="constant", warmup_epochs=2) == [0, 0.2, 0.4, 0.4, 0.4]


def test_past_the_end_it_stays():
    assert at((150,), name="linear", final_lr=0.1) == [0.1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_epochs": 10}, "less than the run's 10 epochs"),
        ({"warmup_epochs": -1}, "at least 0"),
        ({"final_lr": 0.5}, "between 0 and optimizer.lr=0.4"),
        ({"step_epochs": 3}, "belongs to step alone"),
        ({"name": "step"}, "belongs to step alone"),
        ({"name": "step", "step_epochs": 0}, "positive"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        at((0,), **settings)
