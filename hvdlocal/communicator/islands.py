"""Islands: groups of ranks that are one worker, because communication between them is cheap."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Literal

from hvdlocal.communicator.base import Communicator

Island = Literal["node"] | int
"""The ranks of an island: a number, or all ranks of a node."""

REMEDY = 'give island="node", a number that divides the ranks of a node, or a multiple of that number'


def parse_island(value: object, where: str) -> Island:
    """Checks what a user gave as the island.

    Args:
        value: "node", or a number of ranks as a number or as text.
        where: the setting, as a message should show it ("HVDLOCAL_ISLAND").

    Raises:
        ValueError: it is neither.
    """
    if value == "node":
        return "node"
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError(f'{where}={value!r}: give "node" or a number of ranks, at least 1')


def form_islands(communicator: Communicator, island: Island) -> None:
    """Divides the ranks into islands, and sets `island`, `peers` and `islands` of the communicator; a collective.

    Args:
        communicator: all ranks of the job.
        island: ranks of an island; with 1 there are none, and the attributes stay as they are.

    Raises:
        ValueError: on every rank: the ranks ask for different islands, or cannot be divided like this.
        MissingRanksError: on all other ranks: a rank has died.
    """
    with communicator.unbroken():
        everyone = communicator.gather((island, node_name()), "hvdlocal.island")
        for rank, (theirs, _) in enumerate(everyone):
            if theirs != everyone[0][0]:
                raise ValueError(
                    f"island={theirs!r} on rank {rank}, but {everyone[0][0]!r} on rank 0: give the same HVDLOCAL_ISLAND or "
                    "hvdlocal.init(island=…) on all ranks"
                )
        islands = divide(island, [node for _, node in everyone])
        if len(islands[0]) == 1:
            return
        communicator.island, communicator.peers = communicator.split_into_islands(islands)
        communicator.islands = islands


def divide(island: Island, nodes: Sequence[str]) -> list[list[int]]:
    """Divides ranks into islands of one size, each of which lies in one node or consists of whole nodes.

    Args:
        island: ranks of an island.
        nodes: the name of every rank's node.

    Returns:
        The ranks of each island, in ascending order.

    Raises:
        ValueError: the ranks cannot be divided like this.
    """
    ranks_of: dict[str, list[int]] = {}  # in the order of the nodes' first ranks
    for rank, node in enumerate(nodes):
        ranks_of.setdefault(node, []).append(rank)
    if island == "node":
        per_node = {len(ranks) for ranks in ranks_of.values()}
        if len(per_node) > 1:
            raise ValueError(
                f"island='node', but the nodes have different numbers of ranks ({_counts(ranks_of)}): start the same number on "
                "every node, or give a number that divides all of them"
            )
        island = per_node.pop()
    if len(nodes) % island:
        raise ValueError(f"island={island} does not divide {len(nodes)} ranks: {REMEDY}")
    ordered = [rank for ranks in ranks_of.values() for rank in ranks]
    islands = [ordered[start : start + island] for start in range(0, len(ordered), island)]
    for group in islands:
        present = {nodes[rank] for rank in group}
        if len(present) > 1 and sum(len(ranks_of[node]) for node in present) != island:
            raise ValueError(
                f"island={island}: the island of the ranks {group} would hold only a part of a node ({_counts(ranks_of)}): "
                f"{REMEDY}"
            )
    return [sorted(group) for group in islands]


def node_name() -> str:
    """The name of this rank's node: Slurm's and the host's.

    Several nodes of Slurm may be one host; and MPICH's mpiexec gives the Slurm variables of its own node to the ranks of all.
    """
    host, node = socket.gethostname(), os.environ.get("SLURMD_NODENAME")
    return f"{node} ({host})" if node and node != host.partition(".")[0] else host


def _counts(ranks_of: dict[str, list[int]]) -> str:
    told = [f"{node}: {len(ranks)}" for node, ranks in list(ranks_of.items())[:8]]
    return ", ".join(told) + (", …" if len(ranks_of) > 8 else "")
