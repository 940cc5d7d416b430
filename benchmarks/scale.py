"""Step time with up to 16,384 workers, from a link's latency and bandwidth: the tables of docs/scale.md.

python benchmarks/scale.py --latency-microseconds 27 --gigabits 6.7 --parameters 25.6e6 --step-milliseconds 200

Latency and bandwidth are those that benchmarks/slow_link.sh prints for a link, or your own (osu_latency and osu_bw measure them).
The model has one worker per link; with hierarchies (the GPUs of a node first) the inter-node part is cheaper.
"""

from __future__ import annotations

import argparse

from scaling import Link, allreduce_seconds, doubling_seconds, halving_seconds, ring_seconds, straggler_factor

WORKERS = (2, 8, 64, 512, 4096, 16384)
PERIODS = (1, 4, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-microseconds", type=float, required=True)
    parser.add_argument("--gigabits", type=float, required=True, help="per second")
    parser.add_argument("--parameters", type=float, default=25.6e6, help="float32 (default: %(default)s, a ResNet-50)")
    parser.add_argument("--step-milliseconds", type=float, default=200, help="computing (default: %(default)s)")
    parser.add_argument("--variation", type=float, default=0.05, help="of a step's time (default: %(default)s)")
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


if __name__ == "__main__":
    main()
