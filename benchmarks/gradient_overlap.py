"""How much of a gradient's sum data parallelism hides behind a backward pass that takes as long as the sum.

benchmarks/slow_link.sh 1gbit python benchmarks/gradient_overlap.py

A step has three parts: what nothing can hide (forward pass and update), the backward pass b, and the sum c. With one sum after
the backward pass it takes all of them; at best, buckets hide the shorter one of b and c behind the longer one. Both ways to sum
take turns, and the share that is hidden is the median of (step with one sum − step with buckets) / min(b, c) within a turn. The
batch is chosen so that b is about c.
"""

from __future__ import annotations

import argparse
import os
import statistics

os.environ.setdefault("HOROVOD_CYCLE_TIME", "1")

import torch
from synthetic import Network, timed

import hvdlocal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    communicator = hvdlocal.init()

    network = Network(512, 12)
    plain = network.replica()
    flat = torch.zeros(network.parameters)
    sums = [timed(lambda: communicator.sum_(flat, "bench.bare")) for _ in range(7)]

    def backward() -> float:
        return timed(network.loss(plain).backward)

    network.fit(backward, statistics.median(sums))
    ways = []
    for settings in ({"bucket_bytes": None}, {}):
        model = network.replica()
        optimizer = hvdlocal.SynchronousOptimizer(torch.optim.SGD(model.parameters(), lr=1e-4), model, **settings)
        ways.append((model, optimizer))
    rows = []
    for trial in range(arguments.trials + 2):
        row = [backward(), timed(lambda: communicator.sum_(flat, "bench.bare"))]
        row += [timed(lambda way=way: network.step(*way)) for way in (ways if trial % 2 else ways[::-1])][
            :: 1 if trial % 2 else -1
        ]
        if trial > 1:
            rows.append(row)
    if communicator.rank == 0:
        b, c, one, buckets = (1000 * statistics.median(column) for column in zip(*rows, strict=True))
        hidden = statistics.median((row[2] - row[3]) / min(row[0], row[1]) for row in rows)
        print(
            f"{communicator.size} ranks over {communicator.backend}, 1 thread each, Horovod cycle "
            f"{os.environ['HOROVOD_CYCLE_TIME']} ms; {flat.numel() / 1e6:.2f} M parameters, batch {len(network.x)}\n"
            f"backward pass {b:.1f} ms, bare sum {c:.1f} ms; a step with one sum {one:.1f} ms, with buckets {buckets:.1f} ms: "
            f"{hidden:.0%} of the shorter one is hidden"
        )


if __name__ == "__main__":
    main()
