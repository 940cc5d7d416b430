"""Communicators with islands, for tests that try several sizes in one job."""

from __future__ import annotations

import copy
from functools import cache

from hvdlocal.communicator import Communicator


@cache
def with_islands(comm: Communicator, size: int) -> Communicator:
    """A view of the communicator in which consecutive ranks form islands of `size`; a collective at its first call."""
    view = copy.copy(comm)
    view.island = view.peers = None
    view.islands = ()
    if size > 1:
        ranks = range(comm.size)
        view.islands = [ranks[first : first + size] for first in ranks[::size]]
        view.island = comm.split(view.islands, f"test.islands.{size}")
        view.peers = comm.split([ranks[place::size] for place in range(size)], f"test.peers.{size}")
    return view


def island_of(comm: Communicator) -> int:
    """The number of this rank's island."""
    return comm.rank // comm.island_size
