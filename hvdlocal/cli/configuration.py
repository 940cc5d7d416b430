"""Reading a run's configuration from a YAML file and the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import jsonargparse

from hvdlocal.cli.keys import keys, no_such_key, sections
from hvdlocal.cli.settings_file import arguments_of
from hvdlocal.training import TrainConfig

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the help shows each field's text


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that `CONFIG.yaml --section.key value …` describes; later arguments win.

    Raises:
        ValueError: a file that cannot be read, an unknown key (with the nearest known one), a value of the wrong type, or a
            missing one.
        SystemExit: after --help or --print_config.
    """
    if not arguments:
        raise ValueError("no configuration: hvdlocal train CONFIG.yaml (see experiments/)")
    parser = _parser()
    try:
        namespace = parser.parse_args(list(_expanded(arguments)))
    except (OverflowError, RecursionError) as error:
        raise ValueError(f"configuration: a number or a list is larger than any setting takes: {error}") from error
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"configuration: {_explain(str(error))}") from error
    del namespace["config"]
    return TrainConfig(**vars(parser.instantiate(namespace)))


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="hvdlocal train",
        usage="[mpirun -np N] hvdlocal train CONFIG.yaml [--section.key value …] [--print_config]",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file; may also be given first, without --config")
    parser.add_class_arguments(TrainConfig)
    return parser


def _expanded(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments with those that a file holds in its place.

    jsonargparse would read files too, but takes a text where a section belongs for a class, and imports its module.
    """
    known = keys(TrainConfig)
    groups = sections(known)
    rest = iter(arguments)
    for number, argument in enumerate(rest):
        name, equals, value = argument.partition("=")
        if name == "--config":
            path = value if equals else next(rest, None)
            if path is None:
                raise ValueError("--config needs the name of a YAML file")
            yield from arguments_of(path, known)
        elif number == 0 and not argument.startswith("-"):
            yield from arguments_of(argument, known)
        elif name.startswith("--") and name[2:].rstrip("+") in groups:
            raise ValueError(f"{name} is a section: give its keys, as in --{groups[name[2:].rstrip('+')]}")
        else:
            yield argument


def _explain(message: str) -> str:
    """What jsonargparse says, without Python's names for types."""
    message = " ".join(message.split())
    if unknown := re.search(r"[Uu]nrecognized arguments: --([\w.-]+)", message):
        return no_such_key(unknown.group(1), keys(TrainConfig))
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
        (r"a <class 'tuple'>", "a list"),
        (r"a tuple with (\d+) elements", r"a list of \1 values"),
        (r"^unrecognized arguments: (.*)", r"\1 is not a setting; one is written --section.key value"),
        (r"a typing\.Literal", "one of "),
    ):
        message = re.sub(pattern, plain, message)
    return message
