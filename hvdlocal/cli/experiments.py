"""`hvdlocal reproduce bounds|valley|fig7`: experiments in one process, which take seconds or minutes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hvdlocal.exit_codes import ExitCode
from hvdlocal.papers.studies import CIFAR10, SMALL, Setup

if TYPE_CHECKING:
    from hvdlocal.papers.experiment_report import ExperimentReport
    from hvdlocal.training import TrainConfig

EXPERIMENTS = {
    "fig7": "how much the norm of the full gradient varies within a round (Eq. 40)",
    "bounds": "divergence and gradient error within a round, and their bounds (Lemma C.1, Prop. 4.2)",
    "valley": "the drift towards flat minima that QSR's theory predicts, in two dimensions",
}
"""The experiments and what they show."""

FIG7_SETTINGS = ("data.", "model.name", "model.channels_last", "optimizer.", "schedule.", "epochs")
"""The settings that fig7 uses, as prefixes of their names. It refuses others, which would silently have no effect."""

FIG7_IGNORES = ("optimizer.max_norm",)
"""Exceptions to `FIG7_SETTINGS`."""


def require_scipy(name: str) -> None:
    """Checks that SciPy is installed, before the computations whose results need it.

    Raises:
        ValueError: it is not.
    """
    if find_spec("scipy") is None:
        raise ValueError(f"{name} needs SciPy: pip install hvdlocal[reproduce]")


def run(arguments: Sequence[str]) -> int:
    """Runs an experiment and writes its report.

    Raises:
        ValueError: an option or a setting is wrong, or data are missing.
        OSError: the output directory cannot be created.
    """
    name = arguments[0]
    options, train = _parser(name).parse_known_args(arguments)
    if train and name != "fig7":
        raise ValueError(f"{name} has no option {train[0]}: only --seed and --output")
    for word in train:
        key = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and (not key.startswith(FIG7_SETTINGS) or key in FIG7_IGNORES):
            raise ValueError(f"fig7 is plain SGD on one worker, to which {key} means nothing: leave it out")
    options.output.mkdir(parents=True, exist_ok=True)
    finding = _fig7(options, train) if name == "fig7" else _simulation(options)
    paths = finding.write(options.output / name)
    for text, holds in finding.claims:
        print(f"{text}: {'yes' if holds else 'no'}")
    print(" ".join(map(str, paths)))
    return ExitCode.FINISHED


def _simulation(options: argparse.Namespace) -> ExperimentReport:
    if options.experiment == "bounds":
        from hvdlocal.papers import bounds

        return bounds.run(options.seed)
    require_scipy("valley")
    from hvdlocal.papers import valley

    return valley.run(options.seed)


def _fig7(options: argparse.Namespace, train: Sequence[str]) -> ExperimentReport:
    from hvdlocal.papers import gradient_norms

    setting = CIFAR10 if options.scale == "paper" else SMALL
    return gradient_norms.run(_config(setting, options, train), lambda text: print(text, flush=True))


def _config(setting: Setup, options: argparse.Namespace, train: Sequence[str]) -> TrainConfig:
    from hvdlocal.cli.configuration import parse
    from hvdlocal.training.config_checks import check_ranges

    settings = ["--model.name=resnet9"] if options.scale == "paper" else []
    settings += [f"--data.path={options.data}"] if options.data else []
    config = parse([str(setting.path), "--method.preset=sync", *settings, *train, f"--seed={options.seed}"])
    check_ranges(config)
    setting.require_data(config.data.path, (config.data.train_split,))
    return config


def _parser(name: str) -> argparse.ArgumentParser:
    more = " Options that are not listed here go to hvdlocal train, such as --epochs 1." if name == "fig7" else ""
    parser = argparse.ArgumentParser(
        prog="hvdlocal reproduce",
        usage=f"hvdlocal reproduce {name} [options]",
        description=f"{name}: {EXPERIMENTS[name]}. One process, no MPI.{more}",
        allow_abbrev=False,
    )
    parser.add_argument("experiment", choices=tuple(EXPERIMENTS), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="default: runs/reproduce"
    )
    if name != "fig7":
        return parser
    parser.add_argument(
        "--scale",
        choices=("small", "paper"),
        default="small",
        help="a small network on CIFAR-10, or the paper's ResNet-9 on CIFAR-10, which needs a GPU (default: small)",
    )
    parser.add_argument("--data", metavar="DIR", help="the data set; default: as in experiments/")
    return parser
