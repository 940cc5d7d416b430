"""A program for `mpirun --with-ft ulfm`: eight ranks in islands of two, which leave one after another, all of them.

Rank r contributes 2**r, so that a sum tells whose it is. Every survivor checks everything.
"""

from __future__ import annotations

import os
import signal
import sys

import torch

import hvdlocal

NAME = "test.collective"

communicator = hvdlocal.init(backend="mpi4py", survive=True, island=2)
inside, across = communicator.island, communicator.peers
assert inside is not None
assert across is not None
own, left, islands = communicator.rank, list(range(8)), [[0, 1], [2, 3], [4, 5], [6, 7]]


def die(*ranks: int) -> None:
    """Kills these ranks, here and now."""
    if own in ranks:
        os.kill(os.getpid(), signal.SIGKILL)


def sum_over(ranks, elements: int = 3) -> list[float]:
    x = torch.full((elements,), 2.0**own)
    ranks.sum_(x, NAME)
    assert x.min() == x.max()
    return x[0].item()


def check(*lost: int) -> None:
    """Checks all views after the loss of these ranks."""
    if lost:
        assert [loss.ranks for loss in communicator.losses][-1] == lost, communicator.losses
        for rank in lost:
            left.remove(rank)
        islands.remove(list(lost))
    assert communicator.job_ranks == tuple(left)
    assert communicator.islands == [[left.index(rank) for rank in island] for island in islands]
    assert (communicator.rank, communicator.size) == (left.index(own), len(left))
    assert communicator.num_islands == len(islands)
    peers = [rank for rank in left if rank % 2 == own % 2]
    assert across.job_ranks == tuple(peers)
    assert (across.rank, across.size) == (peers.index(own), len(peers))
    assert (inside.job_ranks, inside.rank, inside.size) == ((own & ~1, own | 1), own & 1, 2)
    assert sum_over(inside) == sum(2**rank for rank in inside.job_ranks)
    assert sum_over(across) == sum(2**rank for rank in peers)
    assert sum_over(communicator) == sum(2**rank for rank in left)
    assert inside.gather(own, NAME) == list(inside.job_ranks)


check()

# In a sum across the islands: the other rank of the island is there, and its slice must not count either.
die(3)
total = sum_over(across, 2**20)
assert total == sum(2**rank for rank in (0, 1, 4, 5, 6, 7) if rank % 2 == own % 2)
check(2, 3)

# Inside of an island, the first one, while the others go on to a sum across the islands.
die(0)
sum_over(inside)
sum_over(across)
check(0, 1)

# Between two sums across the islands that are under way, one inside.
sums = [torch.full((3,), 2.0**own) for _ in range(3)]
waits = [ranks.start_sum_(x, NAME) for ranks, x in zip((across, inside, across), sums, strict=True)]
for wait in reversed(waits):
    wait()
totals = [float(sum(2**rank for rank in ranks.job_ranks)) for ranks in (across, inside, across)]
assert [x.tolist() for x in sums] == [[total] * 3 for total in totals]

# In a collective of all ranks.
die(4)
communicator.gather(own, NAME)
check(4, 5)
sys.stderr.write(f"rank {own} is left\n")

# The last one.
die(6)
sum_over(communicator)
