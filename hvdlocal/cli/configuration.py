"""Reading a run's configuration from a YAML file and the command line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import jsonargparse

from hvdlocal.training import TrainConfig

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the help shows each field's text


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, str]:
    """The configuration that `CONFIG.yaml --section.key value …` describes; later arguments win.

    Returns:
        The configuration, and the same as YAML with every default filled in.

    Raises:
        ValueError: an unknown key (with the nearest known one), a value of the wrong type, or a missing one.
        SystemExit: after --help or --print_config.
    """
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments[:1] = ["--config", arguments[0]]
    parser = _parser()
    try:
        namespace = parser.parse_args(arguments)
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(_explain(str(error))) from error
    if not arguments:
        raise ValueError("no configuration: hvdlocal train CONFIG.yaml (see experiments/)")
    text = parser.dump(namespace.clone(), skip_unset=False)
    del namespace["config"]
    return TrainConfig(**vars(parser.instantiate(namespace))), text


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


def _explain(message: str) -> str:
    message = " ".join(message.split())
    unknown = re.search(r"[Oo]ption '(?:--)?([\w.-]+)'", message) or re.search(
        r"[Uu]nrecognized arguments: --([\w.-]+)", message
    )
    if unknown is None:
        return f"configuration: {message}"
    key = unknown.group(1)
    section = re.search(r"Group '([\w.]+)'", message)
    path = f"{section.group(1)}.{key}" if section else key
    known = _keys(TrainConfig)
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.5) or [
        name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]
    ]
    hint = f": did you mean {near[0]!r}?" if near else ": `hvdlocal train --help` lists all keys"
    return f"configuration: there is no key {path!r}{hint}"


def _keys(kind: Any, prefix: str = "") -> list[str]:
    keys = []
    hints = get_type_hints(kind)
    for field in fields(kind):
        inner = hints[field.name]
        keys += _keys(inner, f"{prefix}{field.name}.") if is_dataclass(inner) else [prefix + field.name]
    return keys
