"""Reading a run's configuration from YAML files and the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from hvdlocal.cli.keys import no_such_key, sections
from hvdlocal.cli.settings_file import arguments_of
from hvdlocal.training.config import SETTINGS, TrainConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Returns the configuration that `CONFIG.yaml --section.key value …` describes; later arguments win.

    Raises:
        ValueError: a file cannot be read, a key is unknown (the message has the nearest known one), a value has the wrong type,
            or a required one is missing.
        SystemExit: after --help or --print_config.
    """
    if not arguments:
        raise ValueError("no configuration: hvdlocal train CONFIG.yaml (see experiments/)")
    from jsonargparse import ArgumentError

    parser = _parser()
    single: dict[str, Any] = {}
    try:
        namespace = parser.parse_args(list(_expanded(arguments, single)))
    except (OverflowError, RecursionError) as error:
        raise ValueError(f"configuration: a number or a list is larger than any setting takes: {error}") from error
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"configuration: {_explain(str(error))}") from error
    del namespace["config"]
    for name, value in single.items():
        setting, _, argument = name.rpartition(".")
        namespace[setting][argument] = value
    for name, known in SETTINGS.items():
        if known.takes_any:
            _require_plain(name, namespace[name])
    return TrainConfig(**vars(parser.instantiate(namespace)))


def _parser() -> ArgumentParser:
    import jsonargparse  # here, because commands import this module for their help too

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="hvdlocal train",
        usage="[mpirun -np N] hvdlocal train CONFIG.yaml [--section.key value …] [--print_config]",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file; may also be given first, without --config")
    parser.add_class_arguments(TrainConfig)
    for action in parser._actions:
        setting = SETTINGS.get(action.dest)
        if setting is not None and setting.range is not None:
            action.help = f"{action.help} Must be {setting.range}."
    return parser


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


def _require_plain(name: str, value: Any) -> None:
    """Refuses what no configuration file gives back as it was: names that are no words, and values such as dates."""
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{name}: {odd[0]!r} is no name; write names as words")
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            _require_plain(name, one)
    elif not isinstance(value, bool | int | float | str | None):
        raise ValueError(f"{name}: {value!r} is neither a number nor a word, a list or a mapping; quote it")


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


def _explain(message: str) -> str:
    """Returns jsonargparse's message without Python's names for types."""
    message = " ".join(message.split())
    if unknown := re.search(r"[Uu]nrecognized arguments: --([\w.-]+)", message):
        return no_such_key(unknown.group(1), SETTINGS)
    for pattern, plain in (
        (r'Parser key "([\w.]+)":', r"\1:"),
        (r"Got value: None$", "Got value: null"),  # after "Given value" None is the user's own word
        (
            r"Does not validate .*? Subtypes: \[(<class '\w+'>), <class 'NoneType'>\] Errors: .* Given value: ?",
            r"Expected a \1 or null. Got value: ",
        ),
        (r"a <class 'int'>", "a whole number"),
        (r"a <class 'float'>", "a number"),
        (r"a <class 'bool'>", "true or false"),
        (r"a <class '(?:tuple|list)'>", "a list"),
        (r"a tuple with (\d+) elements", r"a list of \1 values"),
        (r"^unrecognized arguments: (.*)", r"\1 is not a setting; one is written --section.key value"),
        (r"a typing\.Literal", "one of "),
    ):
        message = re.sub(pattern, plain, message)
    return message
