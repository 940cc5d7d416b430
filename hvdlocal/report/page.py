"""A page about one run or many, as a single HTML file that needs no other file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hvdlocal.figures.style import data_uri, save
from hvdlocal.figures.units import bytes_text, seconds_text
from hvdlocal.report.figures import Drawing, draw
from hvdlocal.report.lines import RunStyle, compared_settings, describe_period, draw_as
from hvdlocal.report.records import RecordedState, read_run
from hvdlocal.version import __version__

NONE = "–"


@dataclass(frozen=True)
class Report:
    """The content of the page.

    Attributes:
        lines: the runs with their names and colours.
        drawings: the figures.
        left_out: for each directory that could not be read, the reason.
    """

    lines: list[RunStyle]
    drawings: list[Drawing]
    left_out: list[str]

    def html(self) -> str:
        """Returns the page.

        Raises:
            ImportError: Jinja is missing.
        """
        try:
            import jinja2
        except ImportError as error:
            raise ImportError("a report needs Jinja: pip install hvdlocal[figures]") from error
        template = resources.files(__package__).joinpath("templates/report.html").read_text(encoding="utf-8")
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        return environment.from_string(template).render(
            title=self.lines[0].name if len(self.lines) == 1 else f"{len(self.lines)} runs",
            written=time.strftime("%Y-%m-%d %H:%M %Z"),
            version=__version__,
            rows=[_row(line) for line in self.lines],
            settings=_differing_settings(self.lines),
            configuration=yaml.safe_dump(self.lines[0].run.config, sort_keys=False) if len(self.lines) == 1 else None,
            left_out=self.left_out,
            notes=[f"{line.name}: {note}." for line in self.lines for note in line.run.notes],
            drawings=[(drawing, data_uri(drawing.figure)) for drawing in self.drawings],
        )

    def save_png(self, directory: Path) -> list[Path]:
        """Writes each figure as a PNG.

        Returns:
            The paths of the files.
        """
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / f"{drawing.name}.png" for drawing in self.drawings]
        for path, drawing in zip(paths, self.drawings, strict=True):
            save(drawing.figure, path)
        return paths


def make_report(directories: Sequence[Path]) -> Report:
    """Reads runs and draws them.

    Args:
        directories: the runs' directories; duplicates count once, and directories that are not readable runs are left out.

    Raises:
        ValueError: none of them is a run, or none has recorded anything yet.
    """
    runs, left_out = [], []
    for directory in {Path(os.path.realpath(path)): path for path in directories}.values():
        try:
            runs.append(read_run(directory))
        except ValueError as error:
            left_out.append(str(error))
    if not runs:
        others = f" (and {len(left_out) - 1} more that are no runs)" if len(left_out) > 1 else ""
        raise ValueError(f"{left_out[0]}{others}")
    if not any(run.num_steps for run in runs):
        seconds = runs[0].config.get("log_every_seconds", "some")
        raise ValueError(
            f"{runs[0].directory}/metrics.jsonl has no records yet: a run writes the first after {seconds} s, try again then"
        )
    lines = draw_as(runs)
    return Report(lines, draw([line for line in lines if line.run.num_steps]), left_out)


def _row(line: RunStyle) -> dict[str, Any]:
    """Returns a run's line of the table, as text."""
    run = line.run
    seconds, last = run.seconds, run.history
    share, m, accuracy, top5 = run.data_parallel_share, run.measured_m, run.accuracy, run.evaluations.last("top5")
    loss, epoch, data_epoch = run.evaluations.last("loss"), last.last("epoch"), last.last("data_epoch")
    sent = float(run.bytes_at(last["step"][-1:])[0]) if len(last) else 0.0
    state = run.state.value
    if run.state is not RecordedState.FINISHED and epoch is not None:
        state += f" at {100 * min(1.0, epoch / float(run.config['epochs'])):.0f} %"
    return {
        "color": line.color,
        "dashed": "dashed" if line.dashes != "solid" else "solid",
        "cells": [
            (line.name, "name"),
            (run.preset, "text"),
            (str(run.num_workers), ""),
            (describe_period(run), "text"),
            (NONE if accuracy is None else f"{100 * accuracy:.2f}", ""),
            (NONE if top5 is None else f"{100 * top5:.2f}", ""),
            (NONE if loss is None else f"{loss:.4f}", ""),
            (NONE if epoch is None else f"{epoch:.1f}", ""),
            (NONE if data_epoch is None else f"{data_epoch:.1f}", ""),
            (f"{run.num_steps:,}", ""),
            (f"{run.num_averagings:,}" if run.num_workers > 1 else NONE, ""),
            (bytes_text(sent) if run.num_workers > 1 else NONE, ""),
            (NONE if share is None else f"{100 * share:.1f}", ""),
            (NONE if m is None else f"{m:.2f}", ""),
            (seconds_text(seconds["elapsed"]) if "elapsed" in seconds else NONE, ""),
            (state, run.state.value),
        ],
    }


def _differing_settings(lines: Sequence[RunStyle]) -> dict[str, list[str]]:
    """Returns the settings in which the runs differ and that the table of runs does not show, with each run's value."""
    flat = [compared_settings(line.run) for line in lines]
    # The runs may be from different versions: only settings that all of them have are compared.
    names = [name for name in flat[0] if all(name in settings for settings in flat)]
    shown = ("method.preset", "method.period.")
    columns = {name: [str(settings[name]) for settings in flat] for name in names if not name.startswith(shown)}
    return {name: values for name, values in columns.items() if len(set(values)) > 1}
