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
    """Returns the message about an unknown key, with the nearest known one if there is one whose last word is alike."""
    words = {name: name.rsplit(".", 1)[-1] for name in known}
    alike = difflib.get_close_matches(key.rsplit(".", 1)[-1], set(words.values()), n=3, cutoff=0.7)
    near = difflib.get_close_matches(key, [name for name in known if words[name] in alike], n=1, cutoff=0.0)
    hint = f"did you mean {near[0]!r}?" if near else "`hvdlocal train --help` lists all keys"
    return f"there is no key {key!r}: {hint}"
