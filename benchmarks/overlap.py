"""How much of an average is hidden behind the next τ steps, compared with the model max(0, m − τ)/m.

benchmarks/slow_link.sh 1gbit python benchmarks/overlap.py --rate 1gbit
install/mpirun -np 2 python benchmarks/overlap.py --m 0.2          (in shared memory: what overlap costs where averaging is fast)

m is the time of a bare collective of the averaged bytes over the time of a step without averaging. The batch is chosen so that m
is about --m: by default four steps take 1.2 times as long as the collective, so that by the model τ = 4 hides all of it.

Plain steps, the bare collective, and local steps with every τ take turns, each with a replica of its own. A turn is one round
that is not counted, so that an average is pending, and then --rounds that are; the slowest rank's time counts. What is exposed is
what the optimizer waits for (`seconds_averaging`), and ratios are medians of the ratios within a turn. Where two ranks compute on
two cores, the collective competes with them for the cores; with --idle it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HOROVOD_CYCLE_TIME", "1")

import torch
from harness import machine
from scaling import exposed_steps, utilisation
from synthetic import Network, timed

import hvdlocal


class LocalSteps:
    """Local steps with one choice of τ.

    Args:
        network: what is trained.
        period: H.
        overlap: τ; None for steps without averaging.
    """

    def __init__(self, network: Network, period: int, overlap: int | None) -> None:
        self._network = network
        self._period = period
        self._model = network.replica()
        self._optimizer: torch.optim.Optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-4)
        if overlap is not None:
            rule = hvdlocal.ConstantPeriod(period)
            self._optimizer = hvdlocal.LocalOptimizer(self._optimizer, self._model, period=rule, overlap=overlap)

    def turn(self, rounds: int) -> tuple[float, float]:
        """Returns the seconds of a step, and those of a round in which the optimizer waited."""
        communicator = hvdlocal.init()
        communicator.barrier("bench.start")
        self._rounds(1)
        start, waited = time.perf_counter(), self._seconds_averaging
        self._rounds(rounds)
        seconds, waited = time.perf_counter() - start, self._seconds_averaging - waited
        if isinstance(self._optimizer, hvdlocal.LocalOptimizer):
            self._optimizer.synchronize()
        everyone = communicator.gather((seconds, waited), "bench.seconds")
        return max(one for one, _ in everyone) / rounds / self._period, max(one for _, one in everyone) / rounds

    @property
    def _seconds_averaging(self) -> float:
        return self._optimizer.seconds_averaging if isinstance(self._optimizer, hvdlocal.LocalOptimizer) else 0.0

    def _rounds(self, rounds: int) -> None:
        for _ in range(rounds * self._period):
            self._network.step(self._model, self._optimizer)


def measure(network: Network, arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes all turns.

    Returns:
        Seconds of every turn: of the bare collective, of a plain step, and by τ of a step and of the wait in a round.
    """
    communicator = hvdlocal.init()
    flat = torch.zeros(network.parameters)

    def bare() -> float:
        return timed(lambda: communicator.sum_(flat, "bench.bare"))

    model = network.replica()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    collective = statistics.median(bare() for _ in range(7))
    network.fit(lambda: timed(lambda: [network.step(model, optimizer) for _ in range(4)]) / 4, collective / arguments.m)
    period = arguments.period
    ways = {delay: LocalSteps(network, period, delay) for delay in (None, *sorted({0, *arguments.overlaps}))}
    sums: list[float] = []
    turns: dict[int | None, list[tuple[float, float]]] = {delay: [] for delay in ways}
    for trial in range(arguments.trials + 1):
        collective = bare()
        found = {delay: ways[delay].turn(arguments.rounds) for delay in (ways if trial % 2 else reversed(ways))}
        if trial:
            sums.append(collective)
            for delay, one in found.items():
                turns[delay].append(one)
    return {
        "collective": sums,
        "plain": [step for step, _ in turns.pop(None)],
        "delays": {
            delay: {"step": [a for a, _ in found], "exposed": [b for _, b in found]} for delay, found in turns.items()
        },
    }


def summary(seconds: dict[str, Any], period: int) -> dict[str, Any]:
    """Returns m, and by τ the share of the collective that is exposed, by measurement and model, and the ratios of steps."""

    def ratio(found: list[float], base: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(found, base, strict=True))

    collective, plain, delays = seconds["collective"], seconds["plain"], seconds["delays"]
    m = ratio(collective, plain)
    rows = {}
    for delay, found in delays.items():
        rows[delay] = {
            "exposed": ratio(found["exposed"], collective),
            "exposed_model": exposed_steps(m, period, delay) / m,
            "step": ratio(found["step"], plain),
            "step_model": 1 / utilisation(m, period, delay),
            "step_over_blocking": ratio(found["step"], delays[0]["step"]),
        }
    return {"m": m, "delays": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=float, default=4 / 1.2, help="to aim at (default: %(default).2f)")
    parser.add_argument("--period", type=int, default=16, help="H (default: %(default)s)")
    parser.add_argument(
        "--overlaps", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="τ beside 0 (default: 1 2 4 8 16)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of a turn (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=5, help="turns that are counted (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="of the network's 12 layers (default: %(default)s)")
    parser.add_argument("--idle", action="store_true", help="steps wait instead of computing, as with a GPU")
    parser.add_argument("--rate", default="", help="what the link is, for the title")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    communicator = hvdlocal.init()
    network = Network(arguments.width, 12, idle=arguments.idle)
    seconds = measure(network, arguments)
    if communicator.rank:
        return
    found = summary(seconds, arguments.period)
    print(
        f"{arguments.rate or 'ranks on one node'}, {communicator.size} ranks over {communicator.backend}, "
        f"{'idle' if arguments.idle else 'computing on 1 thread'} during a step; {network.parameters / 1e6:.2f} M parameters, "
        f"H = {arguments.period}; load {os.getloadavg()[0]:.1f}\n"
        f"a plain step takes {1000 * statistics.median(seconds['plain']):.1f} ms, the bare collective "
        f"{1000 * statistics.median(seconds['collective']):.1f} ms: m = {found['m']:.2f}\n"
        f"{'':4}{'exposed / collective':>34}{'step / plain step':>30}{'step / step':>16}\n"
        f"{'τ':>4}{'measured':>22}{'model':>12}{'measured':>18}{'model':>12}{'of τ = 0':>16}"
    )
    for delay, row in found["delays"].items():
        print(
            f"{delay:4}{row['exposed']:22.2f}{row['exposed_model']:12.2f}{row['step']:18.3f}{row['step_model']:12.3f}"
            f"{row['step_over_blocking']:16.3f}"
        )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        facts = machine() | {"rate": arguments.rate, "backend": communicator.backend, "parameters": network.parameters}
        results = {"machine": facts, "period": arguments.period, "seconds": seconds, "summary": found}
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
