"""`hvdlocal reproduce STUDY [--scale small|paper] …`: runs the papers' grids and compares the results with published ones."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvdlocal.cli import reproduce_outer
from hvdlocal.cli.experiments import EXPERIMENTS, require_scipy
from hvdlocal.cli.experiments import run as run_experiment
from hvdlocal.exit_codes import ExitCode
from hvdlocal.launch_command import launcher_words
from hvdlocal.papers import outer_study
from hvdlocal.papers.studies import STUDIES, Grid, GridPoint, Study, grid_points

if TYPE_CHECKING:
    from hvdlocal.papers.grid_report import GridReport
    from hvdlocal.papers.rule_report import RuleReport
    from hvdlocal.papers.runs import GridRun

OWN_OPTIONS = {
    "--method.preset": "--methods",
    "--method.period.period": "--periods",
    "--seed": "--seeds",
    "--data.path": "--data",
}
"""Settings of a run that the grid decides, and the options for them."""


def run(arguments: Sequence[str]) -> int:
    """Runs a study, or its missing runs, and writes the report after every run.

    Returns:
        FINISHED when all runs are done; FAILED when one failed; INTERRUPTED when the command was asked to stop: the same
        command then continues.

    Raises:
        ValueError: an option or a setting is wrong, data are missing, or there are runs with other settings.
    """
    if arguments and arguments[0] in EXPERIMENTS:
        return run_experiment(arguments)
    if named := [word for word in arguments if word in EXPERIMENTS]:
        raise ValueError(f"the experiment's name comes first: hvdlocal reproduce {named[0]} …")
    options, train = _parser().parse_known_args(arguments)
    if options.study == outer_study.NAME:
        return reproduce_outer.run(options, train)
    options.seeds = options.seeds or [0]
    study, grid = _study(options)
    points = list(_points(options, study, grid))
    _check_settings(study, grid, train)

    from hvdlocal.papers.launcher import train_command

    output = options.output or Path("runs") / f"reproduce_{grid.setting.file}"
    runs = list(_runs(grid, points, output, ([f"--data.path={options.data}"] if options.data else []) + train))
    launcher = [] if options.report else launcher_words(options.launcher)
    if options.dry_run:
        for run in runs:
            print(shlex.join(train_command(launcher, run.point.workers, run.arguments)))
        return ExitCode.FINISHED
    if not options.report:
        _prepare(runs, grid)
    output.mkdir(parents=True, exist_ok=True)
    done = _report(study, grid, runs).done
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    print(f"{study.title}\n{grid.setting.title}: {count}, {done} done, in {output}", flush=True)
    code = ExitCode.FINISHED if options.report else _run_missing(study, grid, runs, launcher, output)
    report = _report(study, grid, runs)
    for claim in report.claims():
        print(f"K = {claim['workers']}: {claim['claim']}: {report.answer(claim)}")
    print(" ".join(str(path) for path in report.write(output / study.name)))
    return code


def _check_settings(study: Study, grid: Grid, settings: Sequence[str]) -> None:
    """Checks that none of the settings for `hvdlocal train` is one that the study or the grid decides.

    Raises:
        ValueError: a setting is.
    """
    if not grid.periods and (wrong := [word for word in settings if word.startswith("--method.")]):
        raise ValueError(f"{study.name} decides the method: leave out {wrong[0]}, and choose with --methods")
    if meant := [OWN_OPTIONS[name] for word in settings if (name := word.partition("=")[0]) in OWN_OPTIONS]:
        raise ValueError(f"the grid decides this setting: use {meant[0]}")


def _run_missing(study: Study, grid: Grid, runs: Sequence[GridRun], launcher: Sequence[str], output: Path) -> int:
    """Runs what is missing, and measures the sharpness if the study is about rules for H; returns the exit code."""
    from hvdlocal.papers.runs import run_all

    def after(run: GridRun) -> None:
        report = _report(study, grid, runs)
        report.write(output / study.name)
        print(f"  {report.line(run.point)}", flush=True)

    code = run_all(runs, launcher, lambda text: print(text, flush=True), after)
    if grid.periods or code == ExitCode.INTERRUPTED:
        return code
    return code | _measure(runs)


def _study(options: argparse.Namespace) -> tuple[Study, Grid]:
    """Returns the study and the grid that the options select."""
    if options.study not in STUDIES:
        raise ValueError(
            f"no study {options.study!r}: choose one of {', '.join((*STUDIES, outer_study.NAME, *EXPERIMENTS))}"
        )
    study = STUDIES[options.study]
    grid = study.paper if options.scale == "paper" else study.small
    if grid is None and options.scale == "paper":
        raise ValueError(f"{study.name} has only the small setting: leave out --scale paper")
    if grid is None:
        raise ValueError(f"{study.name} has no small setting, which is CIFAR-10: table2, or {study.name} --scale paper")
    return study, grid


def _points(options: argparse.Namespace, study: Study, grid: Grid) -> Iterator[GridPoint]:
    """Returns the points of the grid that the options select."""
    known = {method.name: method for method in (study.baseline, *study.methods) if method}
    if unknown := [name for name in options.methods or () if name not in known]:
        raise ValueError(f"--methods {unknown[0]}: {study.name} has {', '.join(known)}")
    for name in ("workers", "periods"):
        if wrong := [number for number in getattr(options, name) or () if number < 1]:
            raise ValueError(f"--{name} {wrong[0]}: at least 1")
    if not grid.periods and (options.periods or len(options.workers or ()) > 1):
        raise ValueError(f"{study.name} compares rules for H with one K: no --periods, and one number of --workers")
    methods = [known[name] for name in options.methods or known]
    lists = (methods, options.workers or grid.workers, options.periods or grid.periods, options.seeds)
    return grid_points(*(list(dict.fromkeys(numbers)) for numbers in lists))


def _runs(grid: Grid, chosen: Sequence[GridPoint], output: Path, settings: Sequence[str]) -> Iterator[GridRun]:
    """Yields the runs with their configurations, after checking them."""
    from hvdlocal.cli.grid_run import grid_run

    for point in chosen:
        run = grid_run(grid.setting, point, output, settings)
        switch = run.config.method.period.switch_epochs
        if switch is not None and switch >= run.config.epochs:
            raise ValueError(
                f"{point.method.name} switches after {switch:g} epochs, and the run has {run.config.epochs:g}: leave it out with "
                "--methods"
            )
        yield run


def _prepare(runs: Sequence[GridRun], grid: Grid) -> None:
    """Checks that the data are there, and removes earlier runs if the settings ask for it."""
    from hvdlocal.training.attempts import restart_count

    if not grid.periods:
        require_scipy("qsr")
    data = runs[0].config.data
    grid.setting.require_data(data.path, (data.train_split, data.test_split))
    if runs[0].config.overwrite and restart_count() == 0:  # a job that a batch system starts again continues
        for run in runs:
            run.clear()


def _measure(runs: Sequence[GridRun]) -> int:
    """Measures the sharpness of finished runs for which it is not known yet.

    Returns:
        FINISHED, or FAILED where it could not be measured.
    """
    from hvdlocal.papers import run_sharpness
    from hvdlocal.papers.runs import GridRunState

    code = ExitCode.FINISHED
    for run in runs:
        if run.state is not GridRunState.FINISHED or run_sharpness.stored(run.directory) is not None:
            continue
        try:
            found = run_sharpness.measure(run.directory, run.config)
        except (RuntimeError, ValueError, OSError) as error:
            print(f"{run.point.title}: the sharpness could not be measured: {error}", flush=True)
            code = ExitCode.FAILED
        else:
            print(
                f"{run.point.title}: training loss {found.loss:.3f}, largest eigenvalue {found.largest:.3g}", flush=True
            )
    return code


def _report(study: Study, grid: Grid, runs: Sequence[GridRun]) -> GridReport | RuleReport:
    """Builds the report of the results so far."""
    from hvdlocal.papers import run_sharpness
    from hvdlocal.papers.grid_report import GridReport
    from hvdlocal.papers.rule_report import RuleReport
    from hvdlocal.papers.runs import outcome

    found = {run.point: result for run in runs if (result := outcome(run, grid.setting)) is not None}
    if not grid.periods:
        sharpnesses = {run.point: known for run in runs if (known := run_sharpness.stored(run.directory)) is not None}
        return RuleReport(study, grid.setting, runs[0].config.epochs, found, sharpnesses, len(runs))
    return GridReport(study, grid.setting, runs[0].config.epochs, found, len(runs))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hvdlocal reproduce",
        usage="hvdlocal reproduce STUDY [options] [--section.key value …]",
        description="Run a table or figure of Balles et al. (TMLR 2024), or the rules for H of Gu et al. (ICLR 2024), again, for "
        "every K, H and method, and compare the results with published ones; outer compares outer optimizers, overlap and moment "
        "periods on a language model. A run is a directory; the same command continues "
        "where it was interrupted. Options that are not listed here are passed to hvdlocal train, such as --epochs 1.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "study",
        metavar="STUDY",
        help=f"{', '.join((*STUDIES, outer_study.NAME))}; {', '.join(EXPERIMENTS)}, which have a --help of their own",
    )
    parser.add_argument(
        "--scale",
        choices=("small", "paper"),
        default="small",
        help="a small network on CIFAR-10, which takes about an hour on two cores, or the paper's setting (default: small)",
    )
    parser.add_argument("--workers", type=int, nargs="+", metavar="K", help="numbers of ranks")
    parser.add_argument("--periods", type=int, nargs="+", metavar="H", help="local steps, or accumulated batches")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="some of the study's methods, and baseline (one rank)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="default: 0; for outer 0 1 2")
    parser.add_argument("--data", metavar="DIR", help="the data set; default: as in experiments/")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="directory of the runs; default: runs/reproduce_<setting>"
    )
    parser.add_argument(
        "--launcher",
        metavar="WORDS",
        help="the command that starts ranks, up to their number; default: mpirun -np, with more ranks than cores allowed",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="print the commands of the runs and exit")
    only.add_argument("--report", action="store_true", help="write the report of the finished runs and exit")
    return parser
