"""Reading a run's configuration: from a YAML file, from mappings, or from arguments `--section.key=value`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from hvdlocal.training.config import SETTINGS, TrainConfig
from hvdlocal.training.keys import no_such_key
from hvdlocal.training.settings_file import arguments_of, arguments_of_mapping

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def load_config(
    source: str | PathLike[str] | Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Reads the configuration of a run, as `hvdlocal train` does.

    Args:
        source: path of a YAML file, or a mapping with what one holds: `{"data": {"path": "data/digits"}, …}`.
        settings: replace those of `source`: `{"optimizer": {"lr": 0.1}}`, or `{"optimizer.lr": 0.1}`.

    Raises:
        ValueError: the file cannot be read, a setting is unknown, has a value of the wrong type, or is missing.
    """
    if isinstance(source, Mapping):
        arguments = arguments_of_mapping(source, SETTINGS)
    elif isinstance(source, str | PathLike):
        arguments = arguments_of(source, SETTINGS)
    else:
        raise ValueError(
            f"the configuration is a {type(source).__name__}: give the path of a YAML file, or a dict of settings"
        )
    return config_of([*arguments, *arguments_of_mapping(settings or {}, SETTINGS)])


def config_of(arguments: Sequence[str], single: Mapping[str, Any] | None = None) -> TrainConfig:
    """Returns the configuration that arguments `--section.key=value` describe; later ones win.

    Args:
        arguments: the settings.
        single: single arguments of a user's own code, such as "model.arguments.width", which win over all of them.

    Raises:
        ValueError: a key is unknown (the message has the nearest known one), a value has the wrong type, or a required one is
            missing.
        SystemExit: after --help or --print_config.
    """
    from jsonargparse import ArgumentError

    parser = _parser()
    try:
        namespace = parser.parse_args(list(arguments))
    except (OverflowError, RecursionError) as error:
        raise ValueError(f"configuration: a number or a list is larger than any setting takes: {error}") from error
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"configuration: {_explain(str(error))}") from error
    del namespace["config"]
    for name, value in (single or {}).items():
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
        (
            r"Does not validate .*? Subtypes: \[typing\.Literal(\[.*?\]), (<class '\w+'>)\] Errors: .* Given value: ?",
            r"Expected one of \1 or a \2. Got value: ",
        ),
        (
            r"Does not validate .*? Subtypes: \[typing\.Literal(\[.*?\]), dict\[str, int\]\] Errors: .* Given value: ?",
            r"Expected one of \1 or a mapping of names to whole numbers, such as {exp_avg: 3} (with the space). Got value: ",
        ),
        (r"a <class 'NoneType'>", "null"),
        (r"a <class 'int'>", "a whole number"),
        (r"a <class 'float'>", "a number"),
        (r"a <class 'bool'>", "true or false"),
        (r"a <class '(?:tuple|list)'>", "a list"),
        (r"a <class 'dict'>", "a mapping of names to values"),
        (r"a tuple with (\d+) elements", r"a list of \1 values"),
        (r"^unrecognized arguments: (.*)", r"\1 is not a setting; one is written --section.key value"),
        (r"a typing\.Literal", "one of "),
    ):
        message = re.sub(pattern, plain, message)
    return message
