"""`hvdlocal prepare`: writes data sets as shards; `python -m data_prep` is the same command."""

from __future__ import annotations

from collections.abc import Sequence


def run(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    from data_prep.__main__ import main

    return main(argv, prog="hvdlocal prepare")
