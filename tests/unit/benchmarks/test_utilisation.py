"""The predictions of benchmarks/utilisation.py in closed form, and its table."""

import math

import pytest
import utilisation
from utilisation import Method, Times
from utilisation_figure import Measured, figure, table

FOUR_BUCKETS = 4 * 2**20
"""Bytes of a gradient of four buckets."""


def times(**changes):
    """A step of 1 s, half of it backward; an average of 8 s; a gradient's sum of 4 s inside of an island."""
    return Times(**({"step": 1.0, "backward": 0.5, "average": 8.0, "gradient": 4.0, "latency": 0.0} | changes))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Method("local", 16), 16 / 24),
        (Method("overlap 4", 16, 4), 16 / 20),
        (Method("overlap H", 16, 16), 1),
        (Method("overlap H", 4, 4), 4 / 8),
        # The first of four buckets, of 1 s each, is complete after 1/8 s: they end at 4 1/8, 3 5/8 after the backward pass.
        (Method("data parallel", 0), 1 / 4.625),
        # A step of an island takes 4.625 s, sixteen of them 74 s, and the average 8.
        (Method("islands", 16), 16 / 82),
    ],
)
def test_prediction(method, expected):
    assert utilisation.predicted(method, times(), FOUR_BUCKETS) == pytest.approx(expected)


def test_a_long_backward_pass_hides_all_but_the_last_bucket():
    expected = 20 / 21
    method = Method("data parallel", 0)
    assert utilisation.predicted(method, times(step=20, backward=16), FOUR_BUCKETS) == pytest.approx(expected)


def file(gigabits, ranks, *rows):
    methods = [{"family": family, "period": period, "measured": a, "predicted": b} for family, period, a, b in rows]
    fraction = 0.85 if gigabits else None
    return {"gigabits": gigabits, "fraction": fraction, "machine": {"ranks": ranks}, "methods": methods}


@pytest.fixture
def measured():
    return Measured(
        [
            file(None, 2, ("data parallel", 0, 0.9, 0.95), ("local", 4, 0.98, 1)),
            file(0.1, 2, ("data parallel", 0, 0.1, 0.12), ("local", 4, 0.3, 0.31)),
            file(0.1, 4, ("islands", 4, 0.29, 0.3)),
        ]
    )


def test_table(measured):
    assert measured.links == [0.1, math.inf]
    assert table(measured).splitlines() == [
        "| | H | 100 Mbit/s | no limit |",
        "|---|---|---|---|",
        "| data parallelism | – | 10 % (12) | 90 % (95) |",
        "| local steps | 4 | 30 % (31) | 98 % (100) |",
        "| islands of two | 4 | 29 % (30) | – |",
        "| fraction of the link's rate | – | 0.85 | – |",
    ]


def test_figure_has_a_panel_for_every_period(measured):
    (axes,) = figure(measured).axes
    assert axes.get_title(loc="left") == "H = 4"
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["data parallelism"] == [0.1, 0.9]
    assert lines["islands of two"] == [0.29]
