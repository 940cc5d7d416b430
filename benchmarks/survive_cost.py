"""What an averaging of a job that survives costs when nothing dies; `python benchmarks/survive.py --cost` starts it on two ranks.

Three engines alternate in the same processes, with a barrier before each sum, and the slowest rank's time counts: the one that
survives; that of mpi4py with sums through a second buffer, as they must be made if the operands are to outlive a death; and that
of mpi4py as it is, in place.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from harness import machine
from numpy.typing import NDArray

import hvdlocal
from hvdlocal.communicator import Communicator
from hvdlocal.communicator.mpi4py_backend import PIECE_BYTES, Mpi4pyCommunicator, memory_of
from hvdlocal.communicator.threaded import Call

SIZES = (100_000, 1_000_000, 11_200_000, 25_600_000, 86_600_000)
"""Numbers of float32, the last three as many as ResNet-18, ResNet-50 and ViT-B/16 have parameters."""

MOST = 1.1
"""The largest ratio to the sum out of place that is promised, from the second size on."""


class OutOfPlace(Mpi4pyCommunicator):
    """The engine with sums out of place, in the same pieces, which are then copied back."""

    _received = np.empty(0, np.float32)

    def _start_sum(self, flat: torch.Tensor, name: str) -> Call:
        def collective(host: torch.Tensor) -> None:
            memory = memory_of(host)
            if self._received.size < memory.size:
                self._received = np.empty_like(memory)
            self._sum(memory, self._received[: memory.size])

        return self._in_host_memory(flat, f"sum of {flat.numel()} {flat.dtype} ({name})", collective)

    def _sum(self, memory: NDArray[np.float32], received: NDArray[np.float32]) -> None:
        piece = max(1, PIECE_BYTES // memory.itemsize)
        for start in range(0, memory.size, piece):
            self._ranks.Allreduce(memory[start : start + piece], received[start : start + piece], op=self._mpi.SUM)
        memory[:] = received


def seconds(engines: dict[str, Communicator], numel: int, trials: int, mpi: Any) -> dict[str, list[float]]:
    """Returns the slowest rank's seconds of every trial, by engine; the first trial is not counted.

    Args:
        engines: by name.
        numel: number of float32.
        trials: sums by each engine.
        mpi: the module `mpi4py.MPI`.
    """
    flat = torch.ones(numel)
    found: dict[str, list[float]] = {name: [] for name in engines}
    for trial in range(trials + 1):
        for place in torch.randperm(len(engines), generator=torch.Generator().manual_seed(trial)).tolist():
            name, engine = list(engines.items())[place]
            flat.fill_(1)  # as a step writes the parameters just before they are averaged
            mpi.COMM_WORLD.Barrier()
            start = time.perf_counter()
            engine.sum_(flat, "benchmark")
            slowest = mpi.COMM_WORLD.allreduce(time.perf_counter() - start, op=mpi.MAX)
            assert flat[0] == flat[-1] == mpi.COMM_WORLD.size
            if trial:
                found[name].append(slowest)
    return found


def ratio(one: list[float], other: list[float]) -> float:
    """Returns the median of the ratios within a trial: a slow moment of the machine slows down both."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def main() -> int:
    """Prints a table; returns 1 if an averaging costs more than is promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="numbers of float32")
    parser.add_argument("--trials", type=int, default=31, help="(default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    surviving = hvdlocal.init("mpi4py", survive=True)
    from mpi4py import MPI  # not before: the engine that survives chooses how MPI starts

    engines = {"surviving": surviving, "out of place": OutOfPlace(600), "in place": Mpi4pyCommunicator(600)}
    facts = machine()
    lines = [f"{facts['cpu']}, {facts['cores']} cores, {surviving.size} ranks; medians of {options.trials} trials"]
    lines += [f"{'float32':>12}{'surviving ms':>14}{'out of place ms':>17}{'ratio':>8}{'in place ms':>13}{'ratio':>8}"]
    ratios = []
    for numel in options.sizes:
        found = seconds(engines, numel, options.trials, MPI)
        times = {name: 1e3 * statistics.median(one) for name, one in found.items()}
        ratios.append(ratio(found["surviving"], found["out of place"]))
        lines += [
            f"{numel:12,}{times['surviving']:14.2f}{times['out of place']:17.2f}{ratios[-1]:8.2f}"
            f"{times['in place']:13.2f}{ratio(found['surviving'], found['in place']):8.2f}"
        ]
    if surviving.rank == 0:
        print("\n".join(lines), flush=True)
    return int(max(ratios[1:], default=0) > MOST)


if __name__ == "__main__":
    sys.exit(main())
