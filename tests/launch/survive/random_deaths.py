"""A program for `mpirun --with-ft ulfm`: ranks are killed at random times until one is left: `random_deaths.py SEED`.

Rank r contributes 2**r, so that a sum tells whose it is. Every survivor checks every collective.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time

import torch

import hvdlocal

communicator = hvdlocal.init(backend="mpi4py", survive=True)
own = communicator.rank
common = random.Random(int(sys.argv[1]))  # every rank draws the same from it
order = common.sample(range(communicator.size), communicator.size)
when = 0.0
for rank in order[:-1]:
    when += common.choice([0.0, common.uniform(0.0, 1.5)])  # some at once, and some while the others recover
    if rank == own:
        threading.Timer(when, os.kill, [os.getpid(), signal.SIGKILL]).start()


def total() -> float:
    return float(sum(2**rank for rank in communicator.job_ranks))


collectives = 0
deadline = time.monotonic() + 90
while communicator.size > 1:
    assert time.monotonic() < deadline, communicator.job_ranks
    collectives += 1
    kind = common.choice(["sum", "large", "overlap", "broadcast", "gather"])
    if kind == "gather":
        gathered = communicator.gather(own, "test.gather")
        assert gathered == list(communicator.job_ranks), (gathered, communicator.losses)
    elif kind == "broadcast":
        x = torch.full((1000,), 2.0**own)
        root = common.randrange(communicator.size)
        before = communicator.job_ranks
        communicator.broadcast_(x, "test.broadcast", root=root)
        after = communicator.job_ranks
        sender = before[root] if before[root] in after else after[0]
        # A root that has died after it sent to all cannot be told from one that sent to none, but for the agreement.
        assert x.unique().tolist() == [2.0**sender], (before, after, root)
    elif kind == "overlap":
        tensors = [torch.full((n,), 2.0**own) for n in (10, 10**5, 10)]
        sums = [communicator.start_sum_(tensor, f"test.{i}") for i, tensor in enumerate(tensors)]
        for wait, tensor in zip(sums, tensors, strict=True):
            wait()
            assert tensor.unique().tolist() == [total()], (kind, communicator.losses)
    else:
        x = torch.full((3_000_000 if kind == "large" else 7,), 2.0**own)
        communicator.sum_(x, "test.sum")
        assert x.unique().tolist() == [total()], (kind, communicator.losses)
lost = [rank for loss in communicator.losses for rank in loss.ranks]
assert sorted([*lost, own]) == list(range(communicator.job_size))
sys.stderr.write(
    f"rank {own} is left after {collectives} collectives and {len(lost)} deaths in {len(communicator.losses)} losses\n"
)
