"""Step time with up to 16,384 workers, from a link's latency and bandwidth: the tables of docs/scale.md.

python benchmarks/scale.py --latency-microseconds 27 --gigabits 6.7 --parameters 25.6e6 --step-milliseconds 200

Latency and bandwidth are those that benchmarks/slow_link.sh prints for a link, or your own (osu_latency and osu_bw measure them).
The first two tables have one worker per link. With --island n the third one has nodes of n ranks and `--cards` network cards, and
compares data parallelism that overlaps its sums with the backward pass, local steps of single ranks, and local steps of islands.
"""

from __future__ import annotations

import argparse

from scaling import (
    Link,
    allreduce_seconds,
    doubling_seconds,
    gather_seconds,
    halving_seconds,
    ring_seconds,
    sliced_seconds,
    straggler_factor,
)

from hvdlocal.averaging.gain import gain_ratio
from hvdlocal.plan.overlap import even_buckets, exposed_seconds

WORKERS = (2, 8, 64, 512, 4096, 16384)
NODES = (8, 64, 512, 2048)
PERIODS = (1, 4, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-microseconds", type=float, required=True)
    parser.add_argument("--gigabits", type=float, required=True, help="per second")
    parser.add_argument("--parameters", type=float, default=25.6e6, help="float32 (default: %(default)s, a ResNet-50)")
    parser.add_argument("--step-milliseconds", type=float, default=200, help="computing (default: %(default)s)")
    parser.add_argument("--variation", type=float, default=0.05, help="of a step's time (default: %(default)s)")
    parser.add_argument("--island", type=int, default=1, help="ranks of a node; more than 1 adds the third table")
    parser.add_argument("--cards", type=int, default=1, help="network cards of a node (default: %(default)s)")
    parser.add_argument("--inside-microseconds", type=float, default=10, help="in a node (default: %(default)s)")
    parser.add_argument(
        "--inside-gigabits", type=float, default=800, help="per second, in a node (default: %(default)s)"
    )
    parser.add_argument("--backward", type=float, default=0.6, help="share of a step (default: %(default)s)")
    parser.add_argument("--noise", type=float, default=1e4, help="σ²/G (default: %(default)g)")
    parser.add_argument("--bucket-megabytes", type=float, default=25, help="(default: %(default)s)")
    arguments = parser.parse_args()
    link = Link(arguments.latency_microseconds * 1e-6, arguments.gigabits * 1e9 / 8)
    num_bytes, step = 4 * arguments.parameters, arguments.step_milliseconds / 1e3

    print("One averaging, ms")
    print(f"{'K':>6}{'ring':>10}{'doubling':>10}{'halving':>10}{'best':>10}{'m':>8}")
    for workers in WORKERS:
        times = [
            f(num_bytes, workers, link) for f in (ring_seconds, doubling_seconds, halving_seconds, allreduce_seconds)
        ]
        print(f"{workers:6}" + "".join(f"{1e3 * seconds:10.1f}" for seconds in times) + f"{times[-1] / step:8.2f}")

    print("\nA step over its computing alone (m/H + wait for the slowest), and of it 1 + m/H and the wait")
    print(f"{'K':>6}" + "".join(f"{f'H = {period}':>18}" for period in PERIODS))
    for workers in WORKERS:
        m = allreduce_seconds(num_bytes, workers, link) / step
        cells = []
        for period in PERIODS:
            wait = straggler_factor(workers, period, arguments.variation, rounds=50)
            cells.append(f"{wait + m / period:8.2f} ({1 + m / period:.2f}, {wait:.2f})"[-18:].rjust(18))
        print(f"{workers:6}" + "".join(cells))

    if arguments.island > 1:
        inside = Link(arguments.inside_microseconds * 1e-6, arguments.inside_gigabits * 1e9 / 8)
        _islands(arguments, int(num_bytes), step, inside, link)


def _islands(arguments: argparse.Namespace, num_bytes: int, step: float, inside: Link, across: Link) -> None:
    """Prints a step at both levels over its computing alone; the wait for the slowest rank is left out.

    All sums over all ranks are hierarchical: first in a node, then across, then in the node again.
    """
    n, cards, backward, noise = arguments.island, arguments.cards, arguments.backward * step, arguments.noise
    buckets = even_buckets(num_bytes, int(arguments.bucket_megabytes * 1e6))
    periods = PERIODS[1:]
    print(
        f"\nA step over its computing alone, nodes of {n} ranks; in brackets the time to equal progress for σ²/G = {noise:g}, "
        "in that of sync"
    )
    heads = ("sync", "overlapped", *(f"n = {size}, H = {period}" for size in (1, n) for period in periods))
    print(f"{'K':>6}" + "".join(f"{head:>15}" for head in heads))
    for nodes in NODES:
        workers = n * nodes

        def everyone(part: float, nodes: int = nodes) -> float:
            # The gradients of a node differ: its ranks first sum them to slices, which takes what a gather takes.
            return gather_seconds(part, n, inside) + sliced_seconds(part, nodes, n, inside, across, cards)

        whole, average = everyone(num_bytes), sliced_seconds(num_bytes, nodes, n, inside, across, cards)
        gradient = exposed_seconds(backward, buckets, lambda part: allreduce_seconds(part, n, inside))
        added = [(whole, 1, workers), (exposed_seconds(backward, buckets, everyone), 1, workers)]
        added += [(whole / period, period, 1) for period in periods]
        added += [(gradient + average / period, period, n) for period in periods]
        cells = []
        for seconds, period, size in added:
            gain = gain_ratio(1, noise, workers // size, period, accumulate=size)
            cells.append((1 + seconds / step, (1 + seconds / step) / gain))
        print(f"{workers:6}" + "".join(f"{f'{cost:.2f} ({time / cells[0][1]:.2f})':>15}" for cost, time in cells))


if __name__ == "__main__":
    main()
