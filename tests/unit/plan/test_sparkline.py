"""The sketch of H at a terminal."""

from hvdlocal.plan.sparkline import sparkline


def test_a_power_of_two_per_step_rises_evenly():
    assert sparkline([2.0**i for i in range(16)], rows=2) == [
        "32,768 ┤        ▁▂▃▄▅▆▇█",
        "     1 ┤▁▂▃▄▅▆▇█████████",
    ]


def test_the_smallest_value_can_be_seen_and_the_largest_fills_all_rows():
    top, middle, bottom = sparkline([1, 1, 900, 1], rows=3)
    assert (top, middle, bottom) == ("900 ┤  █", "    │  █", "  1 ┤▁▁█▁")


def test_a_constant():
    assert sparkline([8, 8, 8], rows=2) == ["  │", "8 ┤▁▁▁"]
