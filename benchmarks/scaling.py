"""The cost of an averaging: the α–β model of an allreduce, what overlap hides of it, and the wait for the slowest worker."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Link:
    """The network link of a worker.

    Attributes:
        latency_seconds: α, the time from the start of an empty message to its arrival.
        bytes_per_second: bandwidth of a long message, with the same amount arriving at the same time.
    """

    latency_seconds: float
    bytes_per_second: float

    def __post_init__(self) -> None:
        if self.latency_seconds < 0 or not self.bytes_per_second > 0:
            raise ValueError(f"{self}: latency must not be negative and bandwidth must be positive")


def ring_seconds(num_bytes: float, num_workers: int, link: Link) -> float:
    """Returns the time of a ring allreduce: 2(K−1) messages of n/K bytes (Patarasuk and Yuan, 2009).

    It sends the fewest bytes, but its latency grows with K.
    """
    _check(num_workers)
    return 2 * (num_workers - 1) * (link.latency_seconds + num_bytes / num_workers / link.bytes_per_second)


def doubling_seconds(num_bytes: float, num_workers: int, link: Link) -> float:
    """Returns the time of recursive doubling, which sends everything on each of ⌈log₂ K⌉ levels (Thakur et al., 2005).

    It suits short messages.
    """
    _check(num_workers)
    return math.ceil(math.log2(num_workers)) * (link.latency_seconds + num_bytes / link.bytes_per_second)


def halving_seconds(num_bytes: float, num_workers: int, link: Link) -> float:
    """Returns the time of Rabenseifner's recursive halving and doubling: 2 log₂ K messages with the bytes of a ring.

    If K is not a power of two, the workers beyond the next lower power first send everything to a neighbour and get it back.
    """
    _check(num_workers)
    levels = int(math.log2(num_workers))
    seconds = 2 * levels * link.latency_seconds + 2 * (1 - 2**-levels) * num_bytes / link.bytes_per_second
    if num_workers > 2**levels:
        seconds += 2 * (link.latency_seconds + num_bytes / link.bytes_per_second)
    return seconds


def allreduce_seconds(num_bytes: float, num_workers: int, link: Link) -> float:
    """Returns the time of the best of the three, which a tuned MPI or NCCL would choose."""
    return min(
        algorithm(num_bytes, num_workers, link) for algorithm in (ring_seconds, doubling_seconds, halving_seconds)
    )


def gather_seconds(num_bytes: float, num_workers: int, link: Link) -> float:
    """Returns the time of a ring allgather in which every worker gives its slice of n/K bytes and gets all others."""
    _check(num_workers)
    return (num_workers - 1) * (link.latency_seconds + num_bytes / num_workers / link.bytes_per_second)


def sliced_seconds(num_bytes: float, islands: int, island: int, inside: Link, across: Link, cards: int = 1) -> float:
    """Returns the time of an average across islands by slices, and of the gather inside of them.

    Args:
        num_bytes: of the whole message; each of the n ranks of an island sums its n-th part across.
        islands: M.
        island: n.
        inside: the link of a rank inside of its island.
        across: the link of a network card.
        cards: network cards of an island, at most n, which its ranks share.
    """
    _check(islands)
    share = Link(across.latency_seconds, across.bytes_per_second * min(cards, island) / island)
    sums = allreduce_seconds(num_bytes / island, islands, share)
    return sums + gather_seconds(num_bytes, island, inside)


def straggler_factor(num_workers: int, period: int, variation: float, *, rounds: int = 200, seed: int = 0) -> float:
    """Simulates how much longer a round takes because all wait for the slowest worker: the mean of max_k Σ_h t_kh / H.

    Step times are independent and log-normal with mean 1. They stand for random delays, not for a node that is always slow, for
    which no period helps. Local steps average random delays out, so that the wait falls about as 1/√H.

    Args:
        num_workers: K.
        period: H, steps between two averagings.
        variation: standard deviation of a step's time, relative to its mean.
        rounds: number of simulated rounds.
        seed: seed of the simulation.

    Returns:
        The factor; 1 if no worker waits.
    """
    _check(num_workers)
    if period < 1 or variation < 0 or rounds < 1:
        raise ValueError(f"period={period}, variation={variation}, rounds={rounds}: at least 1, 0 and 1")
    sigma = math.sqrt(math.log1p(variation**2))
    generator = np.random.Generator(np.random.Philox(seed))
    slowest = 0.0
    for _ in range(rounds):
        total = np.zeros(num_workers)
        for _ in range(period):
            total += generator.lognormal(-(sigma**2) / 2, sigma, num_workers)
        slowest += float(total.max()) / period
    return slowest / rounds


def exposed_steps(m: float, period: int, overlap: float = 0) -> float:
    """Returns the part of an average that nothing hides, max(0, m − τ), in step times.

    Args:
        m: time of an average over the time of a step.
        period: H.
        overlap: τ, the steps of the next round behind which the average is hidden. It is applied at the latest at that round's
            end, so τ > H, also infinity, counts as H.
    """
    if m < 0 or period < 1 or overlap < 0:
        raise ValueError(f"m={m}, period={period}, overlap={overlap}: at least 0, 1 and 0")
    return max(0.0, m - min(overlap, period))


def utilisation(m: float, period: int, overlap: float = 0) -> float:
    """Returns the share of its time in which a worker computes, H/(H + max(0, m − τ)); arguments as for `exposed_steps`."""
    return period / (period + exposed_steps(m, period, overlap))


def least_period(m: float, wanted: float, overlap: float = 0) -> int:
    """Returns the smallest H with which a worker computes for a share u of its time.

    While H ≤ τ the average is hidden behind the whole round, and H ≥ u m; beyond that, H ≥ (m − τ) u/(1 − u).

    Args:
        m: time of an average over the time of a step.
        wanted: u, above 0 and below 1.
        overlap: τ, as for `exposed_steps`.
    """
    if not 0 < wanted < 1:
        raise ValueError(f"wanted={wanted}: must be above 0 and below 1")
    least = m * wanted
    if least > overlap:
        least = (m - overlap) * wanted / (1 - wanted)
    return max(1, math.ceil(round(least, 9)))  # 9.000000000000002 is 9


def _check(num_workers: int) -> None:
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers}: at least 1")
