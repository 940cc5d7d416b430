"""The share of the time in which workers compute, by method, over one link, beside the prediction of the cost model.

make utilisation                                                    (100 Mbit/s, 1 and 10 Gbit/s, no limit; the figure and table)
benchmarks/slow_link.sh 1gbit python benchmarks/utilisation.py --gigabits 1 --json FILE
RANKS=4 benchmarks/slow_link.sh 1gbit python benchmarks/utilisation.py --island 2 --gigabits 1 --json FILE

Utilisation is the time of plain steps, without any communication and on all ranks at once, over the time of a method's steps.
Each side of the link is one worker: a rank, or with --island an island of ranks. Methods take turns, each with a replica of its
own; a turn is one round that is not counted, and then --rounds that are. The slowest rank's time counts, and utilisation is the
median of the ratios within a turn. The prediction has no free parameter: it is made of the times of the step, of its backward
pass and of bare collectives, measured in the same turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HOROVOD_CYCLE_TIME", "1")

import torch
from harness import machine
from scaling import exposed_steps
from synthetic import Network, timed

import hvdlocal
from hvdlocal.averaging.islands import Islands
from hvdlocal.plan.overlap import SumTime, even_buckets, exposed_seconds

PERIODS = (4, 16, 64)
OVERLAP = 4
SYNC_STEPS = 4
"""Steps of data parallelism that count as one round."""

BUCKET_BYTES = 2**20
"""Of the sums of a gradient, in which the network's layers are one bucket each."""


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        family: "data parallel", "local", "overlap 4", "overlap H" or "islands".
        period: H; 0 for data parallelism.
        overlap: τ.
    """

    family: str
    period: int
    overlap: int = 0

    @property
    def steps(self) -> int:
        """Steps of a round."""
        return self.period or SYNC_STEPS


def methods(island: int) -> list[Method]:
    """Returns what is measured with ranks as workers, or with islands of so many ranks."""
    if island > 1:
        return [Method("islands", period) for period in PERIODS]
    local = [Method("local", period) for period in PERIODS]
    some = [Method(f"overlap {OVERLAP}", period, OVERLAP) for period in PERIODS if period > OVERLAP]
    whole = [Method("overlap H", period, period) for period in PERIODS]
    return [Method("data parallel", 0), *local, *some, *whole]


@dataclass(frozen=True)
class Times:
    """Seconds that were measured on the way.

    Attributes:
        step: a plain step.
        backward: its backward pass.
        average: the average of the parameters, across the link.
        gradient: the sum of a whole gradient: over all ranks, or inside of an island.
        latency: a sum of one number over the same ranks.
    """

    step: float
    backward: float
    average: float
    gradient: float
    latency: float


def predicted(method: Method, times: Times, num_bytes: int) -> float:
    """Returns a method's utilisation by the cost model of docs/scale.md.

    Args:
        method: that is predicted.
        times: of the step and of bare collectives.
        num_bytes: of the parameters, which are also those of a gradient.
    """
    seconds = times.step
    if method.family in ("data parallel", "islands"):
        line = SumTime.through(times.latency, num_bytes, times.gradient)
        seconds += exposed_seconds(times.backward, even_buckets(num_bytes, BUCKET_BYTES), line)
    if method.period:
        m = times.average / seconds
        seconds *= 1 + exposed_steps(m, method.period, method.overlap) / method.period
    return times.step / seconds


def medians(turns: Mapping[str, Sequence[float]]) -> Times:
    """Returns the medians over the turns."""
    return Times(**{name: statistics.median(seconds) for name, seconds in turns.items()})


class Training:
    """A method with a replica of its own.

    Args:
        network: what is trained.
        method: None for plain steps.
    """

    def __init__(self, network: Network, method: Method | None) -> None:
        self._network = network
        self._model = network.replica()
        self._optimizer: torch.optim.Optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-4)
        if method is None:
            return
        if method.period:
            rule = hvdlocal.ConstantPeriod(method.period)
            self._optimizer = hvdlocal.LocalOptimizer(self._optimizer, self._model, period=rule, overlap=method.overlap)
        else:
            self._optimizer = hvdlocal.SynchronousOptimizer(self._optimizer, self._model)

    def steps(self, count: int) -> None:
        """Takes so many steps."""
        for _ in range(count):
            self._network.step(self._model, self._optimizer)

    def turn(self, steps: int, rounds: int) -> float:
        """Returns the seconds of a step on the slowest rank, in `rounds` rounds after one that is not counted."""
        communicator = hvdlocal.init()
        communicator.barrier("bench.start")
        self.steps(steps)
        start = time.perf_counter()
        self.steps(rounds * steps)
        seconds = (time.perf_counter() - start) / rounds / steps
        if isinstance(self._optimizer, hvdlocal.LocalOptimizer):
            self._optimizer.synchronize()
        return max(communicator.gather(seconds, "bench.seconds"))

    def backward(self) -> float:
        """Returns the seconds of a backward pass."""
        loss = self._network.loss(self._model)
        return timed(loss.backward)


def collectives(communicator: hvdlocal.Communicator, numel: int) -> dict[str, float]:
    """Returns the seconds of one bare collective of each kind, by the names of `Times`."""
    flat, number = torch.zeros(numel), torch.zeros(1)
    inside, across = communicator.island, communicator.peers
    if inside is None or across is None:
        whole = timed(lambda: communicator.sum_(flat, "bench.whole"))
        return {"average": whole, "gradient": whole, "latency": timed(lambda: communicator.sum_(number, "bench.one"))}
    islands = Islands(inside, across, diverge=False)
    return {
        "average": timed(lambda: islands.start_sum_(flat, "bench.across")()),
        "gradient": timed(lambda: inside.sum_(flat, "bench.inside")),
        "latency": timed(lambda: inside.sum_(number, "bench.one")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabits", type=float, help="per second, of the link; by default it has no limit")
    parser.add_argument("--island", type=int, default=1, help="ranks of an island (default: %(default)s)")
    parser.add_argument("--step-milliseconds", type=float, default=20, help="of a plain step (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="of the network's 4 layers (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of a turn (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=2, help="turns that are counted (default: %(default)s)")
    parser.add_argument("--idle", action="store_true", help="steps wait instead of computing, as with a GPU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    communicator = hvdlocal.init(island=arguments.island if arguments.island > 1 else None)
    network = Network(arguments.width, 4, idle=arguments.idle)
    plain = Training(network, None)
    network.fit(lambda: timed(lambda: plain.steps(4)) / 4, arguments.step_milliseconds / 1e3)
    ways = {method: Training(network, method) for method in methods(arguments.island)}
    turns: dict[str, list[float]] = {"step": [], "backward": [], "average": [], "gradient": [], "latency": []}
    steps: dict[Method, list[float]] = {method: [] for method in ways}
    for trial in range(arguments.trials + 1):
        found = {"step": plain.turn(SYNC_STEPS, 3 * arguments.rounds), "backward": plain.backward()}
        found |= collectives(communicator, network.parameters)
        for method in ways if trial % 2 else reversed(ways):
            seconds = ways[method].turn(method.steps, arguments.rounds)
            if trial:
                steps[method].append(seconds)
        if trial:
            for name, value in found.items():
                turns[name].append(value)
    if communicator.rank:
        return
    num_bytes = 4 * network.parameters
    times = medians(turns)
    rate = 8 * num_bytes / times.average / 1e9
    results: dict[str, Any] = {
        "gigabits": arguments.gigabits,
        "fraction": rate / arguments.gigabits if arguments.gigabits else None,
        "seconds": turns,
        "methods": [
            asdict(method)
            | {
                "measured": statistics.median(a / b for a, b in zip(turns["step"], seconds, strict=True)),
                "predicted": predicted(method, times, num_bytes),
                "seconds": seconds,
            }
            for method, seconds in steps.items()
        ],
    }
    link = f"{arguments.gigabits:g} Gbit/s" if arguments.gigabits else "no limit"
    share = f", {results['fraction']:.2f} of the link's" if arguments.gigabits else ""
    print(
        f"{link}, {communicator.backend}, {communicator.size} ranks, {network.parameters / 1e6:.2f} M parameters; load "
        f"{os.getloadavg()[0]:.1f}\na step takes {1000 * times.step:.1f} ms, an average {1000 * times.average:.1f} ms "
        f"(m = {times.average / times.step:.2f}; {rate:.2f} Gbit/s{share})\n"
        f"{'':16}{'H':>4}{'measured':>12}{'predicted':>12}"
    )
    for one in results["methods"]:
        print(f"{one['family']:16}{one['period'] or '':>4}{one['measured']:12.1%}{one['predicted']:12.1%}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        facts = machine() | {"backend": communicator.backend, "ranks": communicator.size, "bytes": num_bytes}
        facts |= {"load": os.getloadavg()[0], "idle": arguments.idle}
        arguments.json.write_text(json.dumps({"machine": facts} | results, indent=2) + "\n")


if __name__ == "__main__":
    main()
