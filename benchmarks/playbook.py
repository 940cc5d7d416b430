"""Which H and τ keep N workers computing, by the speed of their links: the table of docs/playbook.md.

python benchmarks/playbook.py --workers 8 --parameters 124e6 --step-milliseconds 500

An island of ranks is one worker: give the number of islands, and the time of a step with the sums inside of an island.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

from scaling import Link, allreduce_seconds, least_period, utilisation

from hvdlocal.figures.units import bytes_text, short_seconds_text
from hvdlocal.plan.overlap import even_buckets, exposed_seconds

BUCKET_BYTES = 25 * 2**20
OVERLAPS = {"0": 0.0, "1": 1.0, "5": 5.0, "H": math.inf}
"""The values of τ, by the heads of their columns."""


@dataclass(frozen=True)
class Job:
    """N workers and what they train.

    Attributes:
        workers: N, each with a link of its own.
        parameters: P, float32.
        step: t, seconds of a step without communication between workers.
        backward: seconds of its backward pass.
    """

    workers: int
    parameters: float
    step: float
    backward: float

    def __post_init__(self) -> None:
        if not (self.workers >= 1 and self.parameters >= 1 and self.step > 0 and 0 <= self.backward <= self.step):
            raise ValueError(
                f"{self}: workers, parameters and seconds must be positive, and the backward pass is a part of the step"
            )

    def m(self, link: Link) -> float:
        """Returns the time of an average over that of a step."""
        return allreduce_seconds(4 * self.parameters, self.workers, link) / self.step

    def data_parallel(self, link: Link) -> float:
        """Returns the utilisation of data parallelism, whose sums overlap with the backward pass in buckets."""
        buckets = even_buckets(int(4 * self.parameters), BUCKET_BYTES)
        exposed = exposed_seconds(self.backward, buckets, lambda size: allreduce_seconds(size, self.workers, link))
        return utilisation(exposed / self.step, 1)


def lines(job: Job, links: dict[str, Link], wanted: float) -> Iterator[str]:
    """Yields the table, line by line.

    Args:
        job: who trains what.
        links: by their names.
        wanted: share of the time in which a worker is to compute.
    """
    yield (
        f"{job.workers} workers, {job.parameters / 1e6:g} M parameters ({bytes_text(4 * job.parameters)}), steps of "
        f"{1e3 * job.step:g} ms"
    )
    yield f"{'':12}{'an average':>14}{'':9}{'computing in':>18}{f'H for {100 * wanted:g} % computing, with τ =':>40}"
    yield f"{'link':12}{'takes':>14}{'m':>9}{'data parallelism':>18}" + "".join(f"{head:>10}" for head in OVERLAPS)
    for name, link in links.items():
        m = job.m(link)
        periods = "".join(f"{least_period(m, wanted, overlap):10}" for overlap in OVERLAPS.values())
        yield f"{name:12}{short_seconds_text(m * job.step):>14}{m:9.2f}{100 * job.data_parallel(link):16.1f} %{periods}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, required=True, help="N, each with a link of its own")
    parser.add_argument("--parameters", type=float, required=True, help="P, float32")
    parser.add_argument("--step-milliseconds", type=float, required=True, help="t, without communication")
    parser.add_argument(
        "--megabits",
        type=float,
        nargs="+",
        default=[100, 1000, 10_000, 100_000],
        help="per second (default: four links)",
    )
    parser.add_argument("--fraction", type=float, default=0.9, help="of a rate that is reached (default: %(default)s)")
    parser.add_argument("--latency-microseconds", type=float, default=50, help="of a message (default: %(default)s)")
    parser.add_argument("--backward", type=float, default=0.6, help="share of a step (default: %(default)s)")
    parser.add_argument("--wanted", type=float, default=0.9, help="share of computing (default: %(default)s)")
    arguments = parser.parse_args()
    step, latency = arguments.step_milliseconds / 1e3, arguments.latency_microseconds / 1e6
    try:
        job = Job(arguments.workers, arguments.parameters, step, arguments.backward * step)
        links = {
            f"{megabits / 1000:g} Gbit/s" if megabits >= 1000 else f"{megabits:g} Mbit/s": Link(
                latency, arguments.fraction * megabits * 1e6 / 8
            )
            for megabits in arguments.megabits
        }
        print("\n".join(lines(job, links, arguments.wanted)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
