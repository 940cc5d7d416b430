"""Draws a curve in a few lines of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCKS = " ▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], rows: int = 5) -> list[str]:
    """Draws bars on a logarithmic scale: the smallest value is an eighth of a line high, the largest reaches the top.

    Args:
        values: positive values, one per column.
        rows: number of lines, at least 2.

    Returns:
        The lines from top to bottom; the first begins with the largest value and the last with the smallest.
    """
    low, high = min(values), max(values)
    span = math.log(high / low) or 1.0
    heights = [1 + round((8 * rows - 1) * math.log(value / low) / span) for value in values]
    labels = [f"{high:,.0f}" if high > low else "", *[""] * (rows - 2), f"{low:,.0f}"]
    width = max(map(len, labels))
    lines = []
    for row, label in enumerate(labels):
        below = 8 * (rows - 1 - row)
        bars = "".join(BLOCKS[min(max(height - below, 0), 8)] for height in heights)
        lines.append(f"{label:>{width}} {'┤' if label else '│'}{bars}".rstrip())
    return lines
