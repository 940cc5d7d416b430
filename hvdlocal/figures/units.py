"""Formats times and numbers of bytes for people."""

from __future__ import annotations

from collections.abc import Sequence

TIME = (("s", 1.0), ("min", 60.0), ("h", 3600.0))
BYTES = (("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12))


def unit(values: Sequence[float], units: Sequence[tuple[str, float]], least: float = 1.0) -> tuple[str, float]:
    """Returns the name and size of the largest unit in which the largest value is at least `least`."""
    return next((u for u in reversed(units) if max(values) >= least * u[1]), units[0])


def seconds_text(seconds: float) -> str:
    """Formats a time: 12.3 s, 4:05 min, 3:20 h."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 100 else f"{minutes // 60}:{minutes % 60:02} h"


def short_seconds_text(seconds: float) -> str:
    """Formats a time that may be short: 77.2 ms below one second, and otherwise as `seconds_text`."""
    return f"{1000 * seconds:.3g} ms" if 0 < seconds < 0.9995 else seconds_text(seconds)


def remaining_text(seconds: float) -> str:
    """Formats a time that is only estimated: 40 s, 12 min, 3 h 05 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def bytes_text(count: float) -> str:
    """Formats a number of bytes: 22.4 MB."""
    name, size = unit([count], BYTES)
    return f"{count / size:.1f} {name}"


def metric_text(value: float, percent: bool = False) -> str:
    """Formats the value of a metric: 0.0312, 1.880, 24.5, 3.1e-07; a share in percent: 98.66 %."""
    if percent:
        return f"{100 * value:.2f} %"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 10 or value == 0 else f"{value:.4g}"
