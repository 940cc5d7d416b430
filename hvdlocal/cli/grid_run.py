"""A run of a study, with the configuration that its arguments describe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hvdlocal.cli.configuration import parse
from hvdlocal.papers.runs import GridRun
from hvdlocal.papers.studies import GridPoint, Setup
from hvdlocal.training.config_checks import check_ranges


def grid_run(setting: Setup, point: GridPoint, output: Path, settings: Sequence[str]) -> GridRun:
    """Returns a run, after checking its settings.

    Args:
        setting: its data, network and budget.
        point: its method, K, H and seed.
        output: the directory of all runs.
        settings: further arguments of `hvdlocal train`, which the point's precede.

    Raises:
        ValueError: a setting is wrong.
    """
    directory = output / point.name
    arguments = [str(setting.path), *settings, *point.settings, f"--output={directory}"]
    config = parse(arguments)
    check_ranges(config)
    return GridRun(point, directory, arguments, config)
