"""The arithmetic of benchmarks/overlap.py: ratios within a turn, beside the model."""

import overlap
import pytest


def test_summary():
    """Two turns, of which the second was twice as slow throughout: m = 4, and two steps leave (4 − 2)/4 exposed."""
    seconds = {
        "collective": [0.4, 0.8],
        "plain": [0.1, 0.2],
        "delays": {
            0: {"step": [0.15, 0.3], "exposed": [0.44, 0.88]},
            2: {"step": [0.12, 0.24], "exposed": [0.1, 0.2]},
        },
    }
    found = overlap.summary(seconds, period=8)
    assert found["m"] == pytest.approx(4)
    assert found["delays"][0] == pytest.approx(
        {"exposed": 1.1, "exposed_model": 1, "step": 1.5, "step_model": 1.5, "step_over_blocking": 1}
    )
    assert found["delays"][2] == pytest.approx(
        {"exposed": 0.25, "exposed_model": 0.5, "step": 1.2, "step_model": 1.25, "step_over_blocking": 0.8}
    )
