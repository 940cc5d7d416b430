"""Refusing a difference between ranks before it becomes a hang."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from hvdlocal.communicator.base import Communicator
from hvdlocal.communicator.errors import DisagreementError, SetupError
from hvdlocal.communicator.single import SingleProcess
from hvdlocal.terminal import plain

T = TypeVar("T")

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
"""The part of a function's or an object's `repr` that no two processes share."""


def require_agreement(communicator: Communicator, facts: Mapping[str, Any], name: str) -> None:
    """Checks that every rank holds the same facts; a collective.

    Args:
        facts: what must be equal, by name; values are compared by their `repr`, without places in memory and the order of sets.
        name: the collective's name.

    Raises:
        DisagreementError: on every rank, with the same message: which ranks differ from rank 0, and in what.
    """
    # Only text is sent: it is what is compared, and a function among the values could not be pickled.
    everyone = communicator.gather({key: text_of(value) for key, value in facts.items()}, name)
    differences = [
        f"{key}: rank {rank} has {theirs.get(key, '(nothing)')}, rank 0 has {everyone[0].get(key, '(nothing)')}"
        for rank, theirs in enumerate(everyone)
        for key in dict.fromkeys([*everyone[0], *theirs])
        if theirs.get(key) != everyone[0].get(key)
    ]
    if differences:
        shown = differences[:5] + ([f"… and {len(differences) - 5} more"] if len(differences) > 5 else [])
        raise DisagreementError("the ranks do not agree; make these the same everywhere: " + "; ".join(shown))


def text_of(value: Any) -> str:
    """Returns a value's `repr` without what differs between processes: places in memory, and the order of a set's elements."""
    if type(value) in (set, frozenset) and value:
        return "{" + ", ".join(sorted(map(text_of, value))) + "}"
    if type(value) in (list, tuple):
        inside = ", ".join(map(text_of, value))
        return f"[{inside}]" if type(value) is list else f"({inside})"
    if type(value) is dict:
        return "{" + ", ".join(f"{text_of(key)}: {text_of(one)}" for key, one in value.items()) + "}"
    return _ADDRESS.sub("", repr(value))


def succeed_together(communicator: Communicator, work: Callable[[], T], name: str) -> T:
    """Does `work`, which must not communicate, on every rank; a collective.

    Args:
        work: may fail with ValueError, OSError or ImportError, as for a missing file.
        name: the collective's name.

    Raises:
        SetupError: on every rank, with the same message, when the work failed on any: what happened, and where. A
            `SingleProcess` raises the error of the work itself.
    """
    if isinstance(communicator, SingleProcess):
        return work()
    failure = None
    try:
        result = work()
    except (ValueError, OSError, ImportError) as error:
        failure = error
    told = plain(failure) if isinstance(failure, OSError) else str(failure)
    failures = communicator.gather(None if failure is None else told or type(failure).__name__, name)
    failed = [rank for rank, message in enumerate(failures) if message is not None]
    if failed:
        message = failures[failed[0]]
        where = f" (rank {', '.join(map(str, failed[:8]))}{' …' if len(failed) > 8 else ''} of {communicator.size})"
        raise SetupError(message if len(failed) == communicator.size else message + where) from failure
    return result


def on_rank_zero(communicator: Communicator, work: Callable[[], T], name: str) -> T:
    """Does `work` on rank 0 alone; a collective.

    Args:
        work: as for `succeed_together`; its result must be picklable.
        name: the collectives' name.

    Returns:
        Rank 0's result, on every rank.

    Raises:
        SetupError: as `succeed_together`.
    """
    result = succeed_together(communicator, lambda: work() if communicator.rank == 0 else None, name)
    return cast(T, communicator.gather(result, name)[0])


def by_first_rank(communicator: Communicator, work: Callable[[], object], name: str) -> None:
    """Does `work`, which must not communicate, on the first rank; a collective.

    In a job that goes on without ranks that die, the next rank does the work again if the first one dies before all have met.

    Args:
        communicator: the ranks.
        work: may be done twice, for instance writing a file. What it raises is raised on that rank.
        name: the collective's name.
    """
    while True:
        first = communicator.job_ranks[0]
        if communicator.rank == 0:
            work()
        communicator.barrier(name)
        if communicator.job_ranks[0] == first:
            return
