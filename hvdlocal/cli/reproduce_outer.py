"""`hvdlocal reproduce outer`: outer optimizers, overlap and moment periods, each method at its own best learning rate."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvdlocal.cli.experiments import require_scipy
from hvdlocal.exit_codes import ExitCode
from hvdlocal.launch_command import launcher_words
from hvdlocal.papers.outer_study import BY_NAME, METHODS, NAME, SHAKESPEARE, TITLE, TunedMethod, Value, planned

if TYPE_CHECKING:
    from hvdlocal.papers.outer_report import OuterReport
    from hvdlocal.papers.runs import GridRun
    from hvdlocal.papers.studies import GridPoint

SEEDS = (0, 1, 2)

DECIDED = ("--method.", "--optimizer.lr", "--seed", "--data.path")
"""Settings of a run that the study decides, as beginnings of their options."""


class OuterRuns:
    """The runs of the study and their outcomes, read from disk.

    Args:
        output: the directory of the runs.
        settings: further arguments of `hvdlocal train`.
    """

    def __init__(self, output: Path, settings: Sequence[str]) -> None:
        self._output, self._settings = output, settings
        self._runs: dict[GridPoint, GridRun] = {}
        self._values: dict[GridPoint, Value] = {}

    def run(self, point: GridPoint) -> GridRun:
        """Returns a run with its configuration.

        Raises:
            ValueError: a setting is wrong.
        """
        from hvdlocal.cli.grid_run import grid_run

        if point not in self._runs:
            self._runs[point] = grid_run(SHAKESPEARE, point, self._output, self._settings)
        return self._runs[point]

    def found(self, point: GridPoint) -> Value | None:
        """Returns the outcome of a run; None while it is not finished.

        Raises:
            ValueError: its directory holds a run with other settings.
        """
        from hvdlocal.papers.runs import GridRunState
        from hvdlocal.training.run_files import SUMMARY

        if point not in self._values and (self._output / point.name).exists():  # to read a configuration takes time
            run = self.run(point)
            state = run.state
            if state is GridRunState.DIVERGED:
                self._values[point] = Value(math.inf)
            elif state is GridRunState.FINISHED:
                summary = json.loads((run.directory / SUMMARY).read_text(encoding="utf-8"))
                saved = summary.get("communication_saved")
                value = summary["evaluation"][SHAKESPEARE.measure]
                self._values[point] = Value(value, None if saved is None else 1 - saved)
        return self._values.get(point)


def run(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """Makes the runs that are missing, stage by stage, and writes the report after every run.

    Args:
        options: of `hvdlocal reproduce`.
        settings: further arguments of `hvdlocal train`.

    Returns:
        FINISHED when all runs are done; FAILED when one failed; INTERRUPTED when the command was asked to stop: the same
        command then continues.

    Raises:
        ValueError: an option or a setting is wrong, data are missing, or there are runs with other settings.
    """
    methods = _methods(options)
    if wrong := [word for word in settings if word.startswith(DECIDED)]:
        raise ValueError(
            f"{NAME} decides this setting: leave out {wrong[0]}, and choose with --methods, --seeds and --data"
        )
    require_scipy(NAME)
    seeds = list(dict.fromkeys(options.seeds or SEEDS))
    output = options.output or Path("runs") / f"reproduce_{SHAKESPEARE.file}"
    runs = OuterRuns(output, ([f"--data.path={options.data}"] if options.data else []) + list(settings))
    launcher = [] if options.report else launcher_words(options.launcher)
    points = list(planned(methods, seeds, runs.found))
    config = runs.run(points[0]).config
    if options.dry_run:
        from hvdlocal.papers.launcher import train_command

        for point in points:
            print(shlex.join(train_command(launcher, point.workers, runs.run(point).arguments)))
        return ExitCode.FINISHED
    if not options.report:
        SHAKESPEARE.require_data(config.data.path, (config.data.train_split, config.data.test_split))
    output.mkdir(parents=True, exist_ok=True)

    def report() -> OuterReport:
        from hvdlocal.papers.outer_report import OuterReport

        return OuterReport(methods, seeds, runs.found, config.epochs)

    print(f"{TITLE}\n{SHAKESPEARE.title}: {report().done} of {len(points)} runs done so far, in {output}", flush=True)
    code = ExitCode.FINISHED if options.report else _run_missing(methods, seeds, runs, launcher, report, output)
    print(" ".join(str(path) for path in report().write(output / NAME)))
    return code


def _run_missing(
    methods: Sequence[TunedMethod],
    seeds: Sequence[int],
    runs: OuterRuns,
    launcher: Sequence[str],
    report: Callable[[], OuterReport],
    output: Path,
) -> int:
    """Makes the runs of a stage, from which those of the next follow, until none is missing; returns the exit code."""
    from hvdlocal.papers.runs import run_all

    def after(run: GridRun) -> None:
        report().write(output / NAME)
        value = runs.found(run.point)
        assert value is not None
        print(f"  {value.bits_per_byte:.4f} bits per byte", flush=True)

    while missing := [point for point in planned(methods, seeds, runs.found) if runs.found(point) is None]:
        code = run_all([runs.run(point) for point in missing], launcher, lambda text: print(text, flush=True), after)
        if code != ExitCode.FINISHED:
            return code
    return ExitCode.FINISHED


def _methods(options: argparse.Namespace) -> list[TunedMethod]:
    """Returns the methods that the options select.

    Raises:
        ValueError: an option does not suit this study.
    """
    if options.scale != "small" or options.workers or options.periods:
        raise ValueError(
            f"{NAME} has one setting, with K and H for each method: leave out --scale, --workers and --periods"
        )
    if unknown := [name for name in options.methods or () if name not in BY_NAME]:
        raise ValueError(f"--methods {unknown[0]}: {NAME} has {', '.join(BY_NAME)}")
    return [BY_NAME[name] for name in dict.fromkeys(options.methods or (method.name for method in METHODS))]
