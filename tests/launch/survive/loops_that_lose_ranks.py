"""A program for `mpirun --with-ft ulfm`: five ranks train by both optimizers, and die until one is left.

Rank k's gradient is 2^k in every weight, so that the weights tell which ranks have contributed. Every survivor checks each of its
steps; the program fails where one finds a mistake. The argument is the seed of the time at which the last one dies.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable

import torch

import hvdlocal
from hvdlocal.communicator.surviving_backend import SurvivingCommunicator

PERIOD = 3
RATE = 2.0**-10
LAYERS, LAYER = 9, 2**18  # eight buckets of 1 MiB; three pieces of an average

communicator = hvdlocal.init(backend="mpi4py", survive=True)
own = communicator.rank
c = 2.0**own


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(number: int, owner: object, name: str) -> None:
    """Lets this rank die at the beginning of a call of a method; 1 is the next one."""
    method: Callable = getattr(owner, name)
    calls_left = iter(range(number - 1))

    def counted(*arguments, **settings):
        if next(calls_left, None) is None:
            die()
        return method(*arguments, **settings)

    setattr(owner, name, counted)


def die_some_time(rank: int) -> None:
    """Lets a rank die within a second."""
    if rank == own:
        threading.Timer(random.Random(int(sys.argv[1])).uniform(0, 1), die).start()


def mean() -> float:
    """The mean gradient of the ranks that are left."""
    return sum(2.0**rank for rank in communicator.job_ranks) / communicator.size


class Loop:
    """A training loop.

    Args:
        optimizer_class: the optimizer's.
        settings: of the optimizer.
    """

    def __init__(self, optimizer_class: Callable, **settings) -> None:
        self.layers = torch.nn.ParameterList(torch.full((LAYER,), 1.0) for _ in range(LAYERS))
        self.told: list[int] = []
        self.optimizer = optimizer_class(
            torch.optim.SGD(self.layers.parameters(), lr=RATE),
            self.layers,
            on_loss=lambda loss: self.told.extend(loss.ranks),
            **settings,
        )
        self.present = communicator.job_ranks

    def step(self) -> None:
        self.optimizer.zero_grad()
        (c * sum(layer.sum() for layer in self.layers)).backward()
        self.optimizer.step()
        assert self.optimizer.num_workers == communicator.size
        assert tuple(rank for rank in self.present if rank not in self.told) == communicator.job_ranks

    def check(self, expected: float) -> None:
        for layer in self.layers:
            torch.testing.assert_close(layer.detach(), torch.full((LAYER,), expected), rtol=1e-5, atol=1e-5)

    def end(self, expected: float, *lost: int) -> None:
        """Checks that these ranks were lost, and that all that are left hold the same bits."""
        self.check(expected)
        assert sorted(self.told) == list(lost), self.told
        bits = [layer.detach().numpy().tobytes() for layer in self.layers]
        assert communicator.gather(bits[0], "test.bits") == [bits[0]] * communicator.size
        assert bits == [bits[0]] * LAYERS


def local(*lost: int, overlap: int, before: Callable[[int], None] = lambda steps: None) -> None:
    """Takes local steps until ranks are lost, and two rounds more.

    Args:
        lost: the ranks that die meanwhile.
        overlap: steps during which an average is under way.
        before: is called before each step with the number of steps taken.
    """
    loop = Loop(hvdlocal.LocalOptimizer, period=hvdlocal.ConstantPeriod(PERIOD), overlap=overlap)
    optimizer = loop.optimizer
    common, applied, steps, last = 1.0, 0, 0, -1
    while last < 0 or optimizer.round < last:
        before(steps)
        loop.step()
        steps += 1
        under_way = not optimizer.is_quiet
        if optimizer.round - under_way > applied:
            applied += 1
            common -= RATE * PERIOD * mean()
        loop.check(common - RATE * c * (optimizer.steps_in_round + PERIOD * under_way))
        if last < 0 and len(loop.told) == len(lost):
            last = optimizer.round + 2
    optimizer.synchronize()
    loop.end(common - RATE * PERIOD * mean() * (optimizer.round - applied), *lost)


def synchronous(*lost: int, before: Callable[[int], None] = lambda steps: None) -> None:
    """Takes data-parallel steps until ranks are lost, and three more; arguments as in `local`."""
    loop = Loop(hvdlocal.SynchronousOptimizer)
    weight, steps, last = 1.0, 0, -1
    while last < 0 or steps < last:
        before(steps)
        loop.step()
        steps += 1
        weight -= RATE * mean()
        loop.check(weight)
        if last < 0 and len(loop.told) == len(lost):
            last = steps + 3
    loop.optimizer.synchronize()
    loop.end(weight, *lost)


def in_an_average(steps: int) -> None:
    """Two ranks at once, one of them rank 0, when the first part of the second average has been summed."""
    if steps == 2 * PERIOD - 1 and own in (0, 4):
        die_at_call(2, SurvivingCommunicator, "_sum_piece")


def in_a_backward_pass(steps: int) -> None:
    """A rank whose gradients of some layers have been summed."""
    if steps == 4 and own == 2:
        die_at_call(4, communicator, "start_sum_")


local(0, 4, overlap=0, before=in_an_average)
synchronous(2, before=in_a_backward_pass)
die_some_time(3)
local(3, overlap=2)
sys.stderr.write(f"rank {own} is left\n")
