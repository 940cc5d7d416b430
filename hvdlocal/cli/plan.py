"""`hvdlocal plan CONFIG.yaml --ranks N …`: predicts what a run will do and cost."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdlocal.cli.arguments import positive
from hvdlocal.cli.configuration import parse
from hvdlocal.data.format.manifest import MANIFEST_NAME, Manifest, split_directory
from hvdlocal.data.kinds import KINDS
from hvdlocal.data.kinds.tokens import with_block
from hvdlocal.import_path import OwnCodeError
from hvdlocal.plan.averaging_time import AveragingTime
from hvdlocal.plan.forecast import Checkpoints, Forecast
from hvdlocal.plan.run_plan import adapts, plan_run
from hvdlocal.plan.text import compare, describe
from hvdlocal.training.config import OUTER_OF_PRESET, MethodConfig, PeriodConfig, TrainConfig, takes_local_steps
from hvdlocal.training.config_checks import unused_settings
from hvdlocal.training.rules import RULE_SETTINGS, count_workers, describe_method

if TYPE_CHECKING:
    from hvdlocal.training.tasks import DataDescription

_NO_LOCAL_STEPS = {
    "method.island": "1",
    "method.island_period": "1",
    "method.outer.name": "null",
    "method.overlap": "0",
    "method.mixing": "null",
}
"""Settings that data parallelism refuses, without their effect."""


def run(arguments: Sequence[str]) -> int:
    """Prints the plan, or the plans, of a configuration."""
    options, rest = _parser().parse_known_args(arguments)
    if options.ranks_per_node is not None and options.ranks_per_node < 1:
        raise ValueError(f"--ranks-per-node {options.ranks_per_node}: a whole number of at least 1")
    if not rest:
        raise ValueError("no configuration: hvdlocal plan CONFIG.yaml --ranks N (see experiments/)")
    config = parse(rest)
    data = _data(options, config)
    variants = [(describe_method(config.method), config), *_alternatives(rest, config, options.compare)]
    assumes = options.gain is not None or options.grad_var_over_sqr is not None
    if assumes and not any(adapts(one) for _, one in variants):
        raise ValueError(
            f"method.preset={config.method.preset} takes no gain from gradient statistics: --gain and --grad-var-over-sqr "
            "assume nothing"
        )
    forecasts = [_forecast(label, one, data, options) for label, one in variants]
    if len(sizes := sorted({forecast.plan.ranks for forecast in forecasts})) > 1:
        raise ValueError(
            f"--workers {options.workers} compares jobs of {' and '.join(map(str, sizes))} ranks: give --ranks N instead"
        )
    if options.figure:
        from hvdlocal.figures.style import save  # loads Matplotlib
        from hvdlocal.plan.figure import plan_figure

        options.figure.parent.mkdir(parents=True, exist_ok=True)
        save(plan_figure([(forecast.legend, forecast.plan) for forecast in forecasts]), options.figure)
    if options.json:
        print(json.dumps({"samples": data.samples, "plans": [forecast.as_dict() for forecast in forecasts]}, indent=1))
    else:
        ranks = forecasts[0].plan.ranks
        print(f"{ranks} rank{'s' * (ranks > 1)} × {config.data.batch_size} of {data.samples:,} samples\n")
        if unused := unused_settings(config):
            print(f"note: without effect: {', '.join(unused)}\n")
        print(describe(forecasts[0]) if len(forecasts) == 1 else compare(forecasts))
        if options.figure:
            print(f"\n{options.figure}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hvdlocal plan",
        usage="hvdlocal plan CONFIG.yaml --ranks N [--section.key value …] [options]",
        description="Predicts what a run will do and cost: rounds, H, communication, the longest time without an averaging. It "
        "needs no MPI, and of the data only their manifest, or --samples.",
        epilog="CONFIG.yaml and --section.key are those of hvdlocal train; its --help lists them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    number = parser.add_mutually_exclusive_group(required=True)
    number.add_argument("--ranks", type=int, metavar="N", help="ranks of the run, as in mpirun -np N")
    number.add_argument("--workers", type=int, metavar="K", help="or its workers: ranks, or with method.island islands")
    add("--ranks-per-node", type=int, metavar="N", help="ranks on each node, which method.island=node makes an island")
    add("--samples", type=int, metavar="N", help="training samples, when the data are not here")
    add("--classes", type=int, metavar="N", help="classes, when the data are not here; with data.image_size, for bytes")
    add("--bytes", action=argparse.BooleanOptionalAction, default=True, help="count bytes too, which loads torch")
    add("--step-seconds", type=positive, metavar="S", help="time of one optimizer step without communication")
    add(
        "--averaging-seconds",
        type=positive,
        metavar="S",
        help="time of one averaging, or of data parallelism's sum beyond the backward pass",
    )
    add("--checkpoint-seconds", type=positive, metavar="S", help="time for which one checkpoint holds up training")
    add(
        "--mtbf-hours",
        type=positive,
        metavar="H",
        help="mean time between failures of the job; default: checkpoint.failure_hours",
    )
    add("--gain", type=positive, help="gain to assume for the adaptive presets; default: 1")
    add("--grad-var-over-sqr", type=float, metavar="R", help="or σ²/G to assume, which gives the gain for each H")
    add(
        "--compare",
        nargs="+",
        action="extend",
        default=[],
        metavar="SETTINGS",
        help="other settings to compare with, each in quotes: 'rule=constant period=8' 'preset=sync' 'optimizer.lr=0.4'; names "
        "of method.period and method may stand alone",
    )
    add("--figure", type=Path, metavar="FILE", help="also draw it: .png, .pdf or .svg")
    add("--json", action="store_true", help="print JSON, with every stretch of rounds")
    return parser


@dataclass(frozen=True)
class _Images:
    """Images that are described, but not here; see `DataDescription`."""

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    kind: str = "images"
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Data:
    """The facts about the data that a plan uses; without a description there are no bytes."""

    samples: int
    description: DataDescription | None


@dataclass(frozen=True)
class _Arrays:
    """Arrays of the user's own; see `DataDescription`."""

    kind: str = "arrays"
    shape: None = None
    classes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def _data(options: argparse.Namespace, config: TrainConfig) -> _Data:
    if config.data.inputs is not None:
        description = None if config.task == "image-classification" else _Arrays()
        if options.samples is not None:
            return _Data(options.samples, description)
        from hvdlocal.training.samples import count_samples  # loads torch

        return _Data(count_samples(config), description)
    path = split_directory(config.data.path, config.data.train_split) / MANIFEST_NAME
    manifest = None
    if options.samples is None or path.is_file():
        try:
            manifest = Manifest.load(path)
        except FileNotFoundError as error:
            raise ValueError(f"{error}; or say how many training samples there will be: --samples N") from error
    if manifest is not None:
        if config.data.block is not None:
            manifest = replace(manifest, facts=with_block(manifest.kind, manifest.facts, config.data.block))
        samples = KINDS[manifest.kind].num_samples(manifest.facts, manifest.num_samples)
        return _Data(samples if options.samples is None else options.samples, manifest)
    size, classes = config.data.image_size, options.classes
    if size is None or classes is None:
        return _Data(options.samples, None)
    return _Data(options.samples, _Images((size, size, 3), tuple(map(str, range(classes)))))


def _alternatives(
    arguments: Sequence[str], config: TrainConfig, texts: Sequence[str]
) -> Iterator[tuple[str, TrainConfig]]:
    """Yields the configurations of --compare, each with its label.

    A new rule does not inherit the old one's settings, data parallelism nothing that only local steps have, a preset with an
    outer optimizer of its own no other one, and a run without overlap no mixing.
    """
    for text in texts:
        settings = dict(_setting(word) for word in _words(text))
        rule = settings.get("method.period.rule", config.method.period.rule)
        if rule != config.method.period.rule:
            settings = {f"method.period.{name}": "null" for name in RULE_SETTINGS} | settings
        preset = settings.get("method.preset", config.method.preset)
        if config.method.is_local and not takes_local_steps(preset):
            settings = _NO_LOCAL_STEPS | settings
        elif preset in OUTER_OF_PRESET:
            settings = {"method.outer.name": "null"} | settings
        if settings.get("method.overlap") == "0":
            settings = {"method.mixing": "null"} | settings
        yield text, parse([*arguments, *(f"--{key}={value}" for key, value in settings.items())])


def _words(text: str) -> list[str]:
    """Splits settings at spaces, and at commas that a name follows. A mapping in braces is left whole."""
    text = re.sub(r",\s*(?=[\w.]+=)", " ", text)
    return shlex.split(re.sub(r"=(\{[^}]*\})", lambda found: f"={shlex.quote(found[1])}", text))


def _setting(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"--compare {word!r}: settings are written name=value, as in 'rule=constant period=8'")
    key = key.removeprefix("--")
    if key in {field.name for field in fields(PeriodConfig)}:
        return f"method.period.{key}", value
    section = key.split(".")[0]
    return f"method.{key}" if section in {field.name for field in fields(MethodConfig)} else key, value


def _forecast(label: str, config: TrainConfig, data: _Data, options: argparse.Namespace) -> Forecast:
    adaptive = adapts(config)
    plan = plan_run(
        config,
        data.samples,
        _workers(options, config),
        ranks_per_node=options.ranks_per_node,
        gain=options.gain if adaptive else None,
        grad_var_over_sqr=options.grad_var_over_sqr if adaptive else None,
    )
    notes = []
    if adaptive:
        notes.append(_assumed(options, plan.ranks))
    payload = None
    if options.bytes:
        if data.description is not None:
            from hvdlocal.plan.payload import measure_payload  # loads torch

            try:
                payload = measure_payload(
                    config, data.description, island_size=plan.island_size, islands=plan.num_workers
                )
            except OwnCodeError as error:  # a model of the user's own may not be possible without data
                notes.append(f"no bytes, as the model cannot be built on torch's meta device: {error}")
        else:
            notes.append(
                "no bytes, as the model's size is not known without the data: give --classes and --data.image_size"
            )
    checkpoints = None
    if options.checkpoint_seconds is not None:
        hours = config.checkpoint.failure_hours if options.mtbf_hours is None else options.mtbf_hours
        checkpoints = Checkpoints.best(options.checkpoint_seconds, hours)
    averaging = None
    if options.averaging_seconds is not None:
        averaging = AveragingTime.of(plan, options.averaging_seconds, options.step_seconds)
    return Forecast(label, plan, payload, options.step_seconds, averaging, checkpoints, tuple(notes))


def _workers(options: argparse.Namespace, config: TrainConfig) -> int:
    """Returns K of a configuration."""
    if options.ranks is None:
        return int(options.workers)
    return count_workers(options.ranks, config.method.island, options.ranks_per_node)


def _assumed(options: argparse.Namespace, ranks: int) -> str:
    if ranks == 1:
        return "one rank has no gradient statistics, so the adaptive presets have gain 1"
    if options.grad_var_over_sqr is not None:
        return f"assumed σ²/G = {options.grad_var_over_sqr:g} all along, from which Eq. 49 gives the adaptive presets' gain"
    if options.gain is not None:
        return f"assumed a gain of {options.gain:g} for the adaptive presets; epochs of data are in inverse proportion to it"
    return (
        "assumed a gain of 1 for the adaptive presets; epochs of data are in inverse proportion to it (--gain, or "
        "--grad-var-over-sqr)"
    )
