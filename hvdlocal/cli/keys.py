"""The keys of a configuration, as they are written on the command line: section.key."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def sections(known: Collection[str]) -> dict[str, str]:
    """The sections of the keys, each with its first key as an example."""
    found: dict[str, str] = {}
    for key in known:
        parts = key.split(".")
        for depth in range(1, len(parts)):
            found.setdefault(".".join(parts[:depth]), key)
    return found


def no_such_key(key: str, known: Collection[str]) -> str:
    """Returns the message about an unknown key, with the nearest known one."""
    last = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or [
        name for name in known if name.rsplit(".", 1)[-1] == last
    ]
    hint = f"did you mean {near[0]!r}?" if near else "`hvdlocal train --help` lists all keys"
    return f"there is no key {key!r}: {hint}"
