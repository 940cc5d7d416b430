"""The keys of a configuration, as they are written on the command line: section.key."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_type_hints


def keys(kind: Any, prefix: str = "") -> dict[str, bool]:
    """All keys of a dataclass of dataclasses, and whether they can be null."""
    found: dict[str, bool] = {}
    hints = get_type_hints(kind)
    for field in fields(kind):
        inner, key = hints[field.name], prefix + field.name
        found |= keys(inner, f"{key}.") if is_dataclass(inner) else {key: NoneType in get_args(inner)}
    return found


def sections(known: Collection[str]) -> dict[str, str]:
    """What only groups keys, with its first key as an example."""
    found: dict[str, str] = {}
    for key in known:
        parts = key.split(".")
        for depth in range(1, len(parts)):
            found.setdefault(".".join(parts[:depth]), key)
    return found


def no_such_key(key: str, known: Collection[str]) -> str:
    """Says so, with the nearest key that there is."""
    last = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or [
        name for name in known if name.rsplit(".", 1)[-1] == last
    ]
    hint = f"did you mean {near[0]!r}?" if near else "`hvdlocal train --help` lists all keys"
    return f"there is no key {key!r}: {hint}"
