"""A program for `mpirun --with-ft ulfm`: eight ranks die in the collectives of all kinds, until one is left.

Rank r contributes 2**r, so that a sum tells whose it is. Every survivor checks everything; the program fails where one finds a
mistake.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import torch

import hvdlocal

PIECE = 2**20  # elements of float32; see PIECE_BYTES
NAME = "test.collective"

communicator = hvdlocal.init(backend="mpi4py", survive=True)
own, left = communicator.rank, list(range(communicator.size))


def die(*ranks: int) -> None:
    """Kills these ranks, here and now."""
    if own in ranks:
        os.kill(os.getpid(), signal.SIGKILL)


def mine(elements: int = 3) -> torch.Tensor:
    return torch.full((elements,), 2.0**own)


def total() -> float:
    return float(sum(2**rank for rank in left))


def loses(ranks: list[int], collective: str = NAME) -> None:
    """Checks that this collective was the one in which these ranks were lost."""
    for rank in ranks:
        left.remove(rank)
    (*_, loss) = communicator.losses
    assert loss.ranks == tuple(ranks), loss
    assert loss.hosts == (os.uname().nodename,) * len(ranks), loss
    assert loss.remaining == len(left), loss
    assert loss.collective == collective, loss
    assert communicator.job_ranks == tuple(left)
    assert (communicator.rank, communicator.size) == (left.index(own), len(left))
    assert (communicator.local_rank, communicator.local_size) == (communicator.rank, communicator.size)
    assert communicator.gather(own, "test.after") == left


def at_call(number: int, function: Callable, *ranks: int) -> Callable:
    """A function at the beginning of whose call of that number the ranks die."""
    calls = []

    def counted(*arguments):
        calls.append(None)
        if len(calls) == number:
            die(*ranks)
        return function(*arguments)

    return counted


# Between two collectives.
x = mine()
communicator.sum_(x, NAME)
assert x.tolist() == [255.0] * 3
die(3)
x = mine()
communicator.sum_(x, NAME)
loses([3])
assert x.tolist() == [total()] * 3

# Two at once within a sum of several pieces, some of which are there already: the pieces must be those of the same ranks.
communicator._sum_piece = at_call(3, communicator._sum_piece, 1, 6)
x = torch.cat([mine(4 * PIECE), -mine(PIECE // 2)])
communicator.sum_(x, NAME)
loses([1, 6])
assert torch.equal(x, torch.cat([torch.full((4 * PIECE,), total()), torch.full((PIECE // 2,), -total())]))

# The root of a broadcast, which is the first rank.
x = mine()
communicator._agree_on = at_call(1, communicator._agree_on, 0)
communicator.broadcast_(x, NAME)
loses([0])
assert x.tolist() == [2.0 ** left[0]] * 3

# Another than the root.
x = mine()
communicator._agree_on = at_call(1, communicator._agree_on, 2)
communicator.broadcast_(x, NAME, root=2)  # of 2, 4, 5, 7
loses([2])
assert x.tolist() == [2.0**5] * 3

# A gather, while its data are on their way, with several collectives under way.
communicator._exchange = at_call(1, communicator._exchange, 4)
sums = [mine() for _ in range(3)]
first = communicator.start_sum_(sums[0], "test.first")
second = communicator.start_sum_(sums[1], "test.second")
gathered = communicator.gather((own, "x" * 10**6), NAME)
assert [rank for rank, _ in gathered] == [5, 7]
assert communicator.size == 2
assert sums[0].tolist() == sums[1].tolist() == [total()] * 3, "they were before it"
first()
second()
loses([4])

# Slices: that of the lost rank is as the first survivor has it. While a sum is under way, the view does not change.
x = torch.tensor([2.0**own, 2.0**own])
die(7)
communicator.share_slices_(x, NAME)
loses([7], f"{NAME}.0")
assert x.tolist() == [2.0**5, 2.0**5]

x = mine()
communicator.sum_(x, NAME)
assert x.tolist() == [2.0**5] * 3
sys.stderr.write(f"rank {own} is left\n")
