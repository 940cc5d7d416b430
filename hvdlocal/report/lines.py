"""Names, colours and dashes of runs: individual ones for a few runs, shared ones for many."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlocal.figures.style import COLORS, DASHES
from hvdlocal.report.records import Run
from hvdlocal.training.config import SETTINGS, flatten

MOST_LOOKS = 10
"""The largest number of kinds of line that can be told apart in a small panel."""


@dataclass(frozen=True)
class RunStyle:
    """A run as a line in a figure: its name, and the colour, dashes and legend that it may share with other runs."""

    run: Run
    name: str
    legend: str
    color: str
    dashes: Any = "solid"
    legend_color: str | None = None

    @property
    def style(self) -> dict[str, Any]:
        """Arguments for Matplotlib's `plot`."""
        return {"color": self.color, "ls": self.dashes}


def draw_as(runs: Sequence[Run]) -> list[RunStyle]:
    """Chooses names, colours and dashes, in the order of the runs.

    Runs that differ only in their seed look the same. If there are more kinds of run than can be told apart, the colour shows the
    preset, and a larger H is darker.
    """
    names = short_names([run.directory for run in runs])
    keys: list[Any] = [_experiment(run) for run in runs]
    kinds = list(dict.fromkeys(keys))
    if len(kinds) > MOST_LOOKS:
        return _by_preset(runs, names)
    legends = {}
    for kind in kinds:
        members = [i for i, key in enumerate(keys) if key == kind]
        first = runs[members[0]]
        legends[kind] = names[members[0]]
        if len(members) > 1:
            legends[kind] = f"{first.preset}, K = {first.num_workers}, {describe_period(first)} ({len(members)} runs)"
    if len(set(legends.values())) < len(kinds):  # the runs differ in something else
        legends = {kind: f"{names[keys.index(kind)]} ({keys.count(kind)} runs)" for kind in kinds}
    looks = {kind: (COLORS[i % len(COLORS)], DASHES[i // len(COLORS)]) for i, kind in enumerate(kinds)}
    return [RunStyle(run, name, legends[key], *looks[key]) for run, name, key in zip(runs, names, keys, strict=True)]


def describe_period(run: Run) -> str:
    """Describes the rule for H in a few words."""
    period = run.config["method"]["period"]
    if not run.is_local:
        return f"a = {run.accumulate}" if run.accumulate > 1 else "H = 1"
    rule, limit = period["rule"], f", ≤ {period['max_period']}" if period["max_period"] else ""
    base = f"≥ {period['h_base']}"
    return {
        "constant": f"H = {period['period']}",
        "qsr": f"QSR α = {period['alpha']}, {base}",
        "power": f"(α/η)^{period['exponent']}, α = {period['alpha']}, {base}",
        "post-local": f"1, then {period['period']}",
        "adacomm": f"AdaComm from {period['period']}",
    }.get(rule, str(rule)) + limit


def compared_settings(run: Run) -> dict[str, Any]:
    """Returns the settings by which runs are compared, by dotted name: all that influence what is trained."""
    return {
        name: value for name, value in flatten(run.config).items() if name not in SETTINGS or SETTINGS[name].compared
    }


def short_names(directories: Sequence[Path]) -> list[str]:
    """Returns the part of each path in which the paths differ."""
    paths = [path.resolve() for path in directories]
    if len(paths) == 1:
        return [paths[0].name]
    common = os.path.commonpath(paths)
    return [os.path.relpath(path, common) for path in paths]


def _by_preset(runs: Sequence[Run], names: Sequence[str]) -> list[RunStyle]:
    presets = list(dict.fromkeys(run.preset for run in runs))  # at most as many as there are colours
    periods = sorted({_period(run) for run in runs})
    counts = {preset: sum(run.preset == preset for run in runs) for preset in presets}
    note = ", darker for larger H" if len(periods) > 1 else ""
    return [
        RunStyle(
            run,
            name,
            f"{run.preset} ({counts[run.preset]} runs{note})",
            _shaded(COLORS[presets.index(run.preset)], periods.index(_period(run)) / max(1, len(periods) - 1)),
            legend_color=COLORS[presets.index(run.preset)],
        )
        for run, name in zip(runs, names, strict=True)
    ]


def _period(run: Run) -> int:
    period = run.config["method"]["period"]
    return int(period["h_base"] or period["period"])


def _shaded(color: str, depth: float) -> str:
    """Shades a colour from pale (0) to dark (1); both are readable on white."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    shaded = colorsys.hls_to_rgb(hue, min(0.72, lightness + 0.3) * (1 - depth) + 0.7 * lightness * depth, saturation)
    return "#" + "".join(f"{round(255 * part):02X}" for part in shaded)


def _experiment(run: Run) -> str:
    settings = compared_settings(run)
    settings.pop("seed", None)
    return repr((run.num_workers, run.island_size, settings))
