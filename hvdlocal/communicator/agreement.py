"""Refusing a difference between ranks before it becomes a hang."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hvdlocal.communicator.base import Communicator

T = TypeVar("T")


class SetupError(ValueError):
    """A rank cannot start; raised on all ranks."""


class DisagreementError(ValueError):
    """The ranks were started with different settings."""


def require_agreement(communicator: Communicator, facts: Mapping[str, Any], name: str) -> None:
    """Checks that every rank holds the same facts; a collective.

    Args:
        facts: what must be equal, by name; values are compared by their `repr`.
        name: the collective's name.

    Raises:
        DisagreementError: on every rank, with the same message: which ranks differ from rank 0, and in what.
    """
    everyone = communicator.gather(dict(facts), name)
    differences = [
        f"{key}: rank {rank} has {theirs.get(key, '(nothing)')!r}, rank 0 has {everyone[0].get(key, '(nothing)')!r}"
        for rank, theirs in enumerate(everyone)
        for key in dict.fromkeys([*everyone[0], *theirs])
        if key not in theirs or key not in everyone[0] or repr(theirs[key]) != repr(everyone[0][key])
    ]
    if differences:
        shown = differences[:5] + ([f"… and {len(differences) - 5} more"] if len(differences) > 5 else [])
        raise DisagreementError("the ranks do not agree; make these the same everywhere: " + "; ".join(shown))


def succeed_together(communicator: Communicator, work: Callable[[], T], name: str) -> T:
    """Does `work`, which must not communicate, on every rank; a collective.

    Args:
        work: may fail with ValueError, OSError or ImportError, as for a missing file.
        name: the collective's name.

    Raises:
        SetupError: on every rank, with the same message, when the work failed on any: what happened, and where.
    """
    failure = None
    try:
        result = work()
    except (ValueError, OSError, ImportError) as error:
        failure = error
    failures = communicator.gather(None if failure is None else str(failure) or type(failure).__name__, name)
    failed = [rank for rank, message in enumerate(failures) if message is not None]
    if failed:
        message = failures[failed[0]]
        where = f" (rank {', '.join(map(str, failed[:8]))}{' …' if len(failed) > 8 else ''} of {communicator.size})"
        raise SetupError(message if len(failed) == communicator.size else message + where) from failure
    return result
