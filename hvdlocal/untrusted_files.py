"""Reading files that anybody may have written: a configuration, or what a run left.

YAML and JSON can do more than settings and records need. Refused are tags, which make objects; anchors, which make loops and
files that grow without end; a key twice, of which one would silently win; NaN, which is not JSON; and files that are too large,
are no regular files, or are not UTF-8. Everything that is wrong is a `ValueError` of one line.
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
    """A whole small file.

    Raises:
        ValueError: it cannot be read, is no regular file, is longer than `most_bytes`, or is not UTF-8.
    """
    content = next(_pieces(path, most_bytes + 1), b"")
    if len(content) > most_bytes:
        raise ValueError(f"{path} is longer than {most_bytes} bytes, as no such file is")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8") from error


def read_lines(path: Path, most_bytes: int) -> Iterator[bytes]:
    """A file line by line, each with its end.

    Raises:
        ValueError: it cannot be read, is no regular file, or has a line that is longer than `most_bytes`.
    """
    for number, line in enumerate(_pieces(path, most_bytes + 1, by_line=True), 1):
        if len(line) > most_bytes:
            raise ValueError(f"{path}, line {number} is longer than {most_bytes} bytes, as no record is")
        yield line


def from_yaml(text: str) -> Any:
    """Mappings, lists and values.

    Raises:
        ValueError: see the head of this module.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader with less
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(_one_line(error)) from error


def from_json(text: str | bytes) -> Any:
    """Objects, lists and values.

    Raises:
        ValueError: see the head of this module.
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
            raise yaml.MarkedYAMLError(problem="a key is there twice", problem_mark=node.start_mark)
        return found


def _pieces(path: Path, size: int, *, by_line: bool = False) -> Iterator[bytes]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for its writer
            raise ValueError(f"{path} is no file")
        with path.open("rb") as file:
            while piece := file.readline(size) if by_line else file.read(size):
                yield piece
    except OSError as error:
        raise ValueError(f"cannot be read: {plain(error)}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _one_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "too deeply nested"
    return " ".join(str(error).split())
