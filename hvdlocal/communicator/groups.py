"""What divides ranks into groups."""

from __future__ import annotations

from collections.abc import Sequence

Groups = Sequence[tuple[int, ...]]
"""The ranks of each group."""


def check_groups(everyone: Sequence[Groups], where: str) -> None:
    """Checks groups that are to divide the ranks of a job.

    Args:
        everyone: what each rank gave.
        where: the call, for the beginning of a message.

    Raises:
        ValueError: two ranks gave different groups, or a rank is not in exactly one group.
    """
    groups, size = everyone[0], len(everyone)
    for rank, theirs in enumerate(everyone):
        if theirs != groups:
            raise ValueError(
                f"{where}: rank {rank} gave the groups {_shown(theirs)}, rank 0 {_shown(groups)}: give the same on all ranks"
            )
    ascending = all(list(group) == sorted(group) for group in groups)
    if not ascending or sorted(rank for group in groups for rank in group) != list(range(size)):
        raise ValueError(
            f"{where}: the groups {_shown(groups)} do not divide {size} ranks: name every rank from 0 to {size - 1} once, in "
            "ascending order inside a group"
        )


def _shown(groups: Groups) -> str:
    return (", ".join(str(list(group)) for group in groups[:8]) or "(none)") + (" …" if len(groups) > 8 else "")
