"""Formats times and ratios for the advice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev

from hvdlocal.advise.measurements import SampleSummary


def more(ratio: float) -> str:
    return f"{ratio:.1f} times as long" if ratio >= 2 else f"{100 * (ratio - 1):.0f} % more time"


def sampled(blocks: Sequence[SampleSummary]) -> str:
    """Formats the mean and its standard error, which follows from the differences between blocks."""
    error = stdev(one.mean for one in blocks) / math.sqrt(len(blocks))
    return f"{ms(SampleSummary.pooled(blocks).mean)} ± {1000 * error:.2g}"


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{1000 * seconds:.0f} ms"


def brief(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 1000 else f"{seconds:.0f}"


def number(value: float) -> str:
    if math.isinf(value):
        return "∞"
    return f"{value:.0f}" if 1000 <= value < 1e6 else f"{value:.3g}"
