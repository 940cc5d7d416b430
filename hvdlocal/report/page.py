"""A page about one run or many, as a single HTML file that needs no other file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from hvdlocal.figures.style import data_uri, save
from hvdlocal.report.drawing import Drawing
from hvdlocal.report.figures import draw
from hvdlocal.report.lines import RunStyle, compared_settings, draw_as
from hvdlocal.report.records import read_run
from hvdlocal.report.table import describe, run_table
from hvdlocal.version import __version__

LOOKS = {"finished": "good", "running": "busy", "interrupted": "bad", "diverged": "bad"}
"""The class of the template for each state of a run."""


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
            title=self._title(),
            description=describe(self.lines[0].run) if len(self.lines) == 1 else None,
            written=time.strftime("%Y-%m-%d %H:%M %Z"),
            version=__version__,
            lines=self.lines,
            columns=run_table(self.lines),
            looks=LOOKS,
            settings=_differing_settings(self.lines),
            configuration=yaml.safe_dump(self.lines[0].run.config, sort_keys=False) if len(self.lines) == 1 else None,
            left_out=self.left_out,
            notes=[f"{line.name}: {note}." for line in self.lines for note in line.run.notes],
            drawings=[
                (drawing, list(zip(drawing.panels, map(data_uri, drawing.panel_figures()), strict=True)))
                for drawing in self.drawings
            ],
        )

    def _title(self) -> str:
        """Returns the run's name, or the number of runs and what they have been made with."""
        if len(self.lines) == 1:
            return self.lines[0].name
        presets = dict.fromkeys(line.run.preset for line in self.lines)
        return f"{len(self.lines)} runs: {', '.join(presets)}"

    def save_png(self, directory: Path) -> list[Path]:
        """Writes each figure as a PNG.

        Returns:
            The paths of the files.
        """
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / f"{drawing.name}.png" for drawing in self.drawings]
        for path, drawing in zip(paths, self.drawings, strict=True):
            save(drawing.figure(), path)
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


def _differing_settings(lines: Sequence[RunStyle]) -> dict[str, list[str]]:
    """Returns the settings in which the runs differ and that the table of runs does not show, with each run's value."""
    flat = [compared_settings(line.run) for line in lines]
    # The runs may be from different versions: only settings that all of them have are compared.
    names = [name for name in flat[0] if all(name in settings for settings in flat)]
    shown = ("method.preset", "method.period.", "model.name", "data.batch_size", "optimizer.name", "optimizer.lr")
    columns = {name: [str(settings[name]) for settings in flat] for name in names if not name.startswith(shown)}
    return {name: values for name, values in columns.items() if len(set(values)) > 1}
