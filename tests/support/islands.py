"""Communicators with islands, for tests that try several sizes in one job."""

from __future__ import annotations

import copy
from functools import cache

from support.models import mean

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


def odd(comm) -> list[float]:
    """A different c on every rank: 1, 3, 5, 7 …"""
    return [2.0 * rank + 1 for rank in range(comm.size)]


def means(comm) -> list[float]:
    """The mean of `odd` in every island: 2, 6 … in islands of two."""
    n = comm.island_size
    return [mean(odd(comm)[first : first + n]) for first in range(0, comm.size, n)]
