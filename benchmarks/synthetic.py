"""A network for benchmarks of communication: its size sets the length of a message, and its batch the length of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import hvdlocal


class Network:
    """A multilayer perceptron on random data.

    Args:
        width: of all layers.
        layers: number of them.
        idle: whether a step waits where another one computes, as a CPU does whose GPU computes. So the ranks need few of a small
            machine's cores, and what communication costs beside the network's time is left out.
    """

    def __init__(self, width: int, layers: int, *, idle: bool = False) -> None:
        self._width = width
        self._layers = layers
        self._idle = idle
        self._pause = 0.0
        self.x = torch.randn(4 if idle else 64, width)

    @property
    def parameters(self) -> int:
        """Number of its parameters."""
        return self._layers * self._width * (self._width + 1)

    def replica(self) -> nn.Module:
        """Makes a new replica, with the same initial parameters each time."""
        torch.manual_seed(0)
        layers = [layer for _ in range(self._layers) for layer in (nn.Linear(self._width, self._width), nn.ReLU())]
        return nn.Sequential(*layers)

    def loss(self, model: nn.Module) -> torch.Tensor:
        """Makes the forward pass of a batch."""
        time.sleep(self._pause)
        return model(self.x).square().mean()  # type: ignore[no-any-return]

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Makes a whole step of training."""
        optimizer.zero_grad()
        self.loss(model).backward()
        optimizer.step()

    def fit(self, measure: Callable[[], float], seconds: float) -> None:
        """Chooses the batch, or the pause, so that what `measure` returns the seconds of takes so many seconds."""
        for _ in range(3):
            found = statistics.median(measure() for _ in range(5))
            if self._idle:
                self._pause = max(0.0, self._pause + seconds - found)
            else:
                self.x = torch.randn(max(4, int(len(self.x) * seconds / found)), self._width)


def timed(work: Callable[[], object]) -> float:
    """Returns the seconds of the slowest rank, which all begin together."""
    communicator = hvdlocal.init()
    communicator.barrier("bench.start")
    start = time.perf_counter()
    work()
    return max(communicator.gather(time.perf_counter() - start, "bench.seconds"))
