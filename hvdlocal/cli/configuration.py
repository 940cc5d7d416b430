"""Reading a run's configuration from the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from hvdlocal.training.config import SETTINGS, TrainConfig
from hvdlocal.training.configuration import config_of
from hvdlocal.training.keys import sections
from hvdlocal.training.settings_file import arguments_of


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Returns the configuration that `CONFIG.yaml --section.key value …` describes; later arguments win.

    Raises:
        ValueError: as `load_config`.
        SystemExit: after --help or --print_config.
    """
    if not arguments:
        raise ValueError("no configuration: hvdlocal train CONFIG.yaml (see experiments/)")
    single: dict[str, Any] = {}
    expanded = list(_expanded(arguments, single))
    return config_of(expanded, single)


def _expanded(arguments: Sequence[str], single: dict[str, Any]) -> Iterator[str]:
    """Yields the arguments, with each file replaced by those that it holds.

    Args:
        arguments: of the command line.
        single: takes up what is given for one argument of a user's own code, as in `--model.arguments.width 32`.

    jsonargparse would read files too, but takes a text where a section belongs for the name of a class, and imports its module.
    """
    groups = sections(SETTINGS)
    rest = iter(arguments)
    for number, argument in enumerate(rest):
        name, equals, value = argument.partition("=")
        if name == "--config":
            path = value if equals else next(rest, None)
            if path is None:
                raise ValueError("--config needs the name of a YAML file")
            yield from arguments_of(path, SETTINGS)
        elif number == 0 and not argument.startswith("-"):
            yield from arguments_of(argument, SETTINGS)
        elif name.startswith("--") and (setting := SETTINGS.get(name[2:].rpartition(".")[0])) and setting.takes_any:
            text = value if equals else next(rest, None)
            if text is None:
                raise ValueError(f"{name} needs a value")
            single[name[2:]] = _plain_value(name, text)
        elif name.startswith("--") and name[2:].rstrip("+") in groups:
            raise ValueError(f"{name} is a section: give its keys, as in --{groups[name[2:].rstrip('+')]}")
        else:
            yield argument


def _plain_value(name: str, text: str) -> Any:
    """Returns what a text means in YAML: a number, a truth value, a list, a mapping, or the text itself."""
    try:
        value = _with_numbers(yaml.safe_load(text))
        json.dumps(value)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{name}={text}: write a number, a word, a list or a mapping; quote what is none of these"
        ) from error
    return value


def _with_numbers(value: Any) -> Any:
    """Returns a value with its numbers such as 1e-3, which YAML 1.1 takes for words."""
    if isinstance(value, dict):
        return {name: _with_numbers(one) for name, one in value.items()}
    if isinstance(value, list):
        return list(map(_with_numbers, value))
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value)
    return float(value) if is_number else value
