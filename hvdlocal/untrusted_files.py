"""Reads files that anybody may have written: a configuration, or the records of a run.

YAML and JSON allow more than settings and records need. These functions refuse tags, which create objects; anchors, which allow
cycles and exponential growth; duplicate keys, one of which would silently win; NaN, which is not JSON; and files that are too
large, are not regular files, or are not UTF-8. Every problem is reported as a `ValueError` of one line.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from hvdlocal.terminal import plain


def read_text(path: Path, most_bytes: int) -> str:
    """Reads a small file.

    Raises:
        ValueError: the file cannot be read, is not a regular file, is longer than `most_bytes`, or is not UTF-8.
    """
    content = next(_pieces(path, most_bytes + 1), b"")
    if len(content) > most_bytes:
        raise ValueError(f"{path} is longer than {most_bytes} bytes, the limit for such a file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8") from error


def read_lines(path: Path, most_bytes: int) -> Iterator[bytes]:
    """Yields the lines of a file, with their line ends.

    Raises:
        ValueError: the file cannot be read, is not a regular file, or has a line longer than `most_bytes`.
    """
    for number, line in enumerate(_pieces(path, most_bytes + 1, by_line=True), 1):
        if len(line) > most_bytes:
            raise ValueError(f"{path}, line {number} is longer than {most_bytes} bytes, the limit for a record")
        yield line


def from_yaml(text: str) -> Any:
    """Converts YAML to dicts, lists and values.

    Raises:
        ValueError: the text is not valid or not allowed; see the module's docstring.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a restricted SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(_one_line(error)) from error


def from_json(text: str | bytes) -> Any:
    """Converts JSON to dicts, lists and values.

    Raises:
        ValueError: the text is not valid or not allowed; see the module's docstring.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(_one_line(error)) from error


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not read", problem_mark=event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem="tags are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise yaml.MarkedYAMLError(problem="a key occurs twice", problem_mark=node.start_mark)
        return found


def _pieces(path: Path, size: int, *, by_line: bool = False) -> Iterator[bytes]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise ValueError(f"{path} is not a regular file")
        with path.open("rb") as file:
            while piece := file.readline(size) if by_line else file.read(size):
                yield piece
    except OSError as error:
        raise ValueError(f"cannot be read: {plain(error)}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _one_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "too deeply nested"
    return " ".join(str(error).split())
