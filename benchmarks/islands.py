"""Averaging between islands: by slices, compared with one allreduce over all ranks.

RANKS=4 benchmarks/slow_link.sh 1gbit python benchmarks/islands.py    (two islands of two ranks, the link between them)

Rank j of every island sums slice j of the message with the ranks at its place in the other islands; then the island gathers its
slices. So 1/n of the message crosses the link from every rank, and 1/n of what an allreduce that does not see the link may send.
The candidates alternate in the same processes, with a barrier before each and the slowest rank's time counting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import machine

import hvdlocal
from hvdlocal.averaging.islands import Islands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=44.8, help="of the message (default: %(default)s)")
    parser.add_argument("--island", type=int, default=2, help="ranks of an island (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=9)
    parser.add_argument("--rate", default="", help="what the link is, for the title")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    communicator = hvdlocal.init(island=arguments.island)
    if communicator.island is None or communicator.peers is None:
        raise SystemExit("islands of one rank: give --island 2 or more, and start more ranks")
    islands = Islands(communicator.island, communicator.peers, diverge=False)
    numel = int(arguments.megabytes * 1e6 / 4) // arguments.island * arguments.island
    message = torch.zeros(numel, dtype=torch.float32)
    slices = message.split(numel // arguments.island)
    peers, mine = communicator.peers, communicator.island.rank
    candidates: dict[str, Callable[[], object]] = {
        "one allreduce over all ranks": lambda: communicator.sum_(message, "bench.whole"),
        "by slices": lambda: islands.start_sum_(message, "bench.slices")(),
        "of it the sums across": lambda: peers.sum_(slices[mine], "bench.across"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for trial in range(arguments.trials + 1):
        for name, work in candidates.items():
            communicator.barrier("bench.start")
            start = time.perf_counter()
            work()
            slowest = max(communicator.gather(time.perf_counter() - start, "bench.seconds"))
            if trial:
                seconds[name].append(slowest)
    if communicator.rank:
        return
    whole = seconds["one allreduce over all ranks"]
    ratios = {
        name: statistics.median(a / b for a, b in zip(found, whole, strict=True)) for name, found in seconds.items()
    }
    print(
        f"{arguments.rate or 'ranks on one node'}, {communicator.backend}: {communicator.num_islands} islands of "
        f"{arguments.island} ranks, {4 * numel / 1e6:.1f} MB; load {os.getloadavg()[0]:.1f}\n"
        f"{'':32}{'ms, median':>12}{'min … max':>16}{'/ allreduce':>14}"
    )
    for name, found in seconds.items():
        spread = f"{1000 * min(found):.0f} … {1000 * max(found):.0f}"
        print(f"{name:32}{1000 * statistics.median(found):12.0f}{spread:>16}{ratios[name]:14.2f}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        facts = machine() | {"rate": arguments.rate, "backend": communicator.backend, "bytes": 4 * numel}
        results = {"machine": facts, "island": arguments.island, "seconds": seconds, "ratios": ratios}
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
