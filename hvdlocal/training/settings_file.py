"""Reads a file or a mapping of settings as the command-line arguments that mean the same.

YAML can do far more than settings need. Sections, values, lists of values and mappings of names to values are read. Refused are
tags, which make objects; anchors, which make loops and files that grow without end; and a repeated key, of which one would
silently win. A value stays the text in the file, so that it means the same there and on the command line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from os import PathLike
from pathlib import PurePath
from typing import Any

import yaml

from hvdlocal.training.keys import no_such_key, sections
from hvdlocal.training.settings import Setting

MOST_BYTES = 1 << 16  # all settings, with comments, take a tenth of it

MOST_LEVELS = 10
"""Levels of lists and mappings in one value."""

_NULL = ("", "~", "null", "Null", "NULL")


def arguments_of(path: str | PathLike[str], known: Mapping[str, Setting]) -> list[str]:
    """The settings of a YAML file, each as `--section.key=value`.

    Args:
        path: the file.
        known: all settings by their dotted names.

    Raises:
        ValueError: the file cannot be read, has content that this module refuses, or has an unknown key; the message names the
            line.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}: give the path of a YAML file, from where the job starts") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give the path of a YAML file") from error
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path} is longer than {MOST_BYTES} bytes, as no configuration is: name a YAML file")
    try:
        return list(_Reader(content.decode("utf-8-sig"), known).arguments())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: this is not UTF-8; save the file as UTF-8 text") from error
    except (_MistakeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}{_where_and_what(error)}") from error


def arguments_of_mapping(settings: Mapping[str, Any], known: Mapping[str, Setting]) -> list[str]:
    """The settings of a mapping, which has the sections of a YAML file or dotted names, each as `--section.key=value`.

    Raises:
        ValueError: a key is unknown, or a value is of a type that no YAML file has.
    """
    if not settings:
        return []
    try:
        text = yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        return list(_Reader(text, known).arguments())
    except yaml.representer.RepresenterError as error:
        what = error.args[-1]
        raise ValueError(
            f"configuration: {what!r} is a {type(what).__name__}: give numbers, strings, lists and dicts"
        ) from error
    except _MistakeError as error:
        raise ValueError(f"configuration: {error}") from error


class _Dumper(yaml.SafeDumper):
    """Writes every value where it belongs, and paths as their names."""

    def ignore_aliases(self, data: Any) -> bool:
        """See `yaml.representer`."""
        return True


_Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))


class _MistakeError(ValueError):
    """A mistake in the file, with its line."""

    def __init__(self, event: yaml.Event, what: str) -> None:
        super().__init__(what)
        self.line = _line(event)


def _read_ahead(events: Iterator[yaml.Event]) -> Iterator[yaml.Event]:
    """Reads all events, so that what is no YAML is reported before what is no setting.

    Stops where brackets are nested deeper than in any setting, since YAML's time for them is quadratic.
    """
    read: list[yaml.Event] = []
    levels = 0
    while levels <= 2 * MOST_LEVELS and (event := next(events, None)) is not None:
        read.append(event)
        levels += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
    return chain(read, events)


class _Reader:
    """Walks through YAML's events, from which no object has been made yet, and never deeper than the known sections."""

    def __init__(self, text: str, known: Mapping[str, Setting]) -> None:
        self._events = _read_ahead(yaml.parse(text, Loader=yaml.SafeLoader))
        self._known = known
        self._sections = sections(known)
        self._lines: dict[str, int] = {}

    def arguments(self) -> Iterator[str]:
        """Yields all settings."""
        next(self._events)  # the beginning of the stream
        document = self._next()
        first = self._next() if isinstance(document, yaml.DocumentStartEvent) else document
        if isinstance(first, yaml.StreamEndEvent) or _is_null(first):
            raise _MistakeError(first, "it holds no settings; experiments/ has examples")
        if not isinstance(first, yaml.MappingStartEvent):
            raise _MistakeError(first, "settings are written as `key: value`; experiments/ has examples")
        yield from self._section("")
        self._next()  # the end of the document
        if not isinstance(more := self._next(), yaml.StreamEndEvent):
            raise _MistakeError(more, "a second document (---) begins; keep one")

    def _next(self) -> yaml.Event:
        event = next(self._events)
        if (name := getattr(event, "anchor", None)) is not None:
            raise _MistakeError(
                event, f"anchors and aliases (&{name}, *{name}) are not read; write the value where it belongs"
            )
        if (tag := getattr(event, "tag", None)) is not None:
            raise _MistakeError(event, f"tags ({tag}) are not read; write the plain value")
        return event

    def _section(self, prefix: str) -> Iterator[str]:
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise _MistakeError(event, "a key must be one word")
            key = prefix + event.value
            if key not in self._known and key not in self._sections:
                raise _MistakeError(event, no_such_key(key, self._known))
            if key in self._lines:
                raise _MistakeError(event, f"{key!r} is here again, after line {self._lines[key]}; keep one of them")
            self._lines[key] = _line(event)
            content = self._next()
            if key in self._known:
                yield f"--{key}={self._value(key, content)}"
            elif isinstance(content, yaml.MappingStartEvent):
                yield from self._section(f"{key}.")
            elif not _is_null(content):  # all keys of a section may be commented out
                raise _MistakeError(
                    content, f"{key!r} is a section: write its keys below it, as in {self._sections[key]!r}"
                )

    def _value(self, key: str, event: yaml.Event) -> str:
        if self._known[key].takes_any and not isinstance(event, yaml.ScalarEvent):
            return self._nested(key, event, MOST_LEVELS)
        if isinstance(event, yaml.SequenceStartEvent):
            return f"[{', '.join(self._items(f'{key!r} takes a list of plain values', yaml.SequenceEndEvent))}]"
        if isinstance(event, yaml.MappingStartEvent) and self._known[key].takes_mapping:
            words = list(self._items(f"{key!r} takes a mapping of names to plain values", yaml.MappingEndEvent))
            names, values = words[::2], words[1::2]
            if again := next((name for number, name in enumerate(names) if name in names[:number]), None):
                raise _MistakeError(event, f"{key!r} has {again} twice; keep one of them")
            return f"{{{', '.join(map(': '.join, zip(names, values, strict=True)))}}}"
        if not isinstance(event, yaml.ScalarEvent):
            raise _MistakeError(event, f"{key!r} is one value, not a section")
        if not _is_null(event):
            return event.value
        if not self._known[key].nullable:
            raise _MistakeError(event, f"{key!r} has no value; give it one, or leave the key out")
        return "null"

    def _nested(self, key: str, event: yaml.Event, levels: int) -> str:
        """Returns a value that may hold lists and mappings, in YAML's flow style."""
        if levels == 0:
            raise _MistakeError(event, f"{key!r} is nested more than {MOST_LEVELS} levels deep")
        if isinstance(event, yaml.SequenceStartEvent):
            parts = []
            while not isinstance(inner := self._next(), yaml.SequenceEndEvent):
                parts.append(self._nested(key, inner, levels - 1))
            return f"[{', '.join(parts)}]"
        if isinstance(event, yaml.MappingStartEvent):
            found: dict[str, str] = {}
            while not isinstance(name := self._next(), yaml.MappingEndEvent):
                if not isinstance(name, yaml.ScalarEvent):
                    raise _MistakeError(name, f"a name in {key!r} must be one word")
                if name.value in found:
                    raise _MistakeError(name, f"{key!r} has {name.value} twice; keep one of them")
                found[name.value] = self._nested(key, self._next(), levels - 1)
            return (
                f"{{{', '.join(f'{json.dumps(name, ensure_ascii=False)}: {value}' for name, value in found.items())}}}"
            )
        assert isinstance(event, yaml.ScalarEvent)
        if _is_null(event):
            return "null"
        plain = event.implicit[0] and re.fullmatch(
            r"[\w.+-]+", event.value
        )  # YAML may read a number or a truth value in it
        return event.value if plain else json.dumps(event.value, ensure_ascii=False)

    def _items(self, expected: str, end: type[yaml.Event]) -> Iterator[str]:
        """Yields the plain values up to an event, quoted where YAML would read signs in them."""
        while not isinstance(event := self._next(), end):
            if not isinstance(event, yaml.ScalarEvent):
                raise _MistakeError(event, expected)
            yield event.value if re.fullmatch(r"[\w.+-]+", event.value) else json.dumps(event.value)


def _is_null(event: yaml.Event) -> bool:
    return isinstance(event, yaml.ScalarEvent) and event.implicit[0] and event.value in _NULL


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None
    return event.start_mark.line + 1


def _where_and_what(error: Exception) -> str:
    """Returns the part of the message that follows the file's name."""
    if isinstance(error, _MistakeError):
        return f", line {error.line}: {error}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f", line {error.problem_mark.line + 1}: this is no YAML: {error.problem}"
    return f" is no YAML: {' '.join(str(error).split())}"
