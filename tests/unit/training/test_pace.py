"""Speed and remaining time, from marks whose numbers are given."""

import pytest

from hvdlocal.training.pace import MARKS, Mark, Pace


def test_the_speed_is_that_of_the_last_interval_without_evaluations():
    pace = Pace(100.0, Mark(0, 0, 0.0, 0.0))
    assert pace.samples_per_second is None
    pace.add(Mark(1, 1000, 10.0, 0.0))
    assert pace.samples_per_second == 100
    pace.add(Mark(2, 3000, 25.0, 5.0))
    assert pace.samples_per_second == 200
    pace.add(Mark(2, 3000, 25.0, 5.0))
    assert pace.samples_per_second is None, "no time has passed"


def test_the_remaining_time_follows_from_progress():
    pace = Pace(100.0, Mark(0, 0, 0.0, 0.0))
    assert pace.remaining_seconds(0.0, 5.0) is None
    assert pace.remaining_seconds(20.0, 10.0) == pytest.approx(40)
    assert pace.remaining_seconds(100.5, 50.0) == 0


def test_earlier_starts_of_the_run_do_not_count():
    """Half of the budget took 1,000 s before the interruption; on the machine of now it takes 10."""
    pace = Pace(100.0, Mark(50.0, 0, 1000.0, 0.0))
    assert pace.remaining_seconds(75.0, 1005.0) == pytest.approx(5)


def test_a_pace_that_changes_is_followed():
    """From the middle on, a step takes ten times as long."""
    pace = Pace(4.0 * MARKS, Mark(0, 0, 0.0, 0.0))
    for i in range(1, MARKS + 1):
        pace.add(Mark(i, i, i, 0.0))
    for i in range(1, MARKS + 1):
        pace.add(Mark(MARKS + i, MARKS + i, MARKS + 10 * i, 0.0))
    assert pace.remaining_seconds(2 * MARKS, 11 * MARKS) == pytest.approx(2 * MARKS * 10)
