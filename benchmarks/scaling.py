"""What an averaging costs with many workers: the usual α–β model of an allreduce, and the wait for the slowest worker."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Link:
    """What one worker can send.

    Attributes:
        latency_seconds: α, from the start of a message to its arrival when it is empty.
        bytes_per_second: β, of a long message, while as much arrives.
    """

    latency_seconds: float
    bytes_per_second: float

    def __post_init__(self) -> None:
        if self.latency_seconds < 0 or not self.bytes_per_second > 0:
            raise ValueError(f"{self}: latency must not be negative and bandwidth must be positive")


def ring_seconds(num_bytes: float, num_workers: int, link: Link) -> float:
    """A ring allreduce: 2(K−1) messages of n/K bytes. Sends least, but its latency grows with K (Patarasuk and Yuan, 2009)."""
    _check(num_workers)
    return 2 * (num_workers - 1) * (link.latency_seconds + num_bytes / num_workers / link.bytes_per_second)


def doubling_seconds(num_bytes: float, num_workers: int, link: Link) -> float:
    """Recursive doubling, a tree of ⌈log₂ K⌉ levels: everything goes over each. For short messages (Thakur et al., 2005)."""
    _check(num_workers)
    return math.ceil(math.log2(num_workers)) * (link.latency_seconds + num_bytes / link.bytes_per_second)


def halving_seconds(num_bytes: float, num_workers: int, link: Link) -> float:
    """Rabenseifner's recursive halving, then doubling: 2 log₂ K messages, together as many bytes as a ring's.

    With a K that is no power of two, those beyond the next lower one hand everything to a neighbour first and get it back.
    """
    _check(num_workers)
    levels = int(math.log2(num_workers))
    seconds = 2 * levels * link.latency_seconds + 2 * (1 - 2**-levels) * num_bytes / link.bytes_per_second
    if num_workers > 2**levels:
        seconds += 2 * (link.latency_seconds + num_bytes / link.bytes_per_second)
    return seconds


def allreduce_seconds(num_bytes: float, num_workers: int, link: Link) -> float:
    """The best of the three, as a tuned MPI or NCCL chooses."""
    return min(
        algorithm(num_bytes, num_workers, link) for algorithm in (ring_seconds, doubling_seconds, halving_seconds)
    )


def straggler_factor(num_workers: int, period: int, variation: float, *, rounds: int = 200, seed: int = 0) -> float:
    """How much longer a round takes because everyone waits for the slowest: mean over rounds of max_k Σ_h t_kh / H.

    Simulated, with step times that are independent and log-normal with mean 1: the hiccups of a node, not a node that is
    always slow, which no period helps. Local steps average hiccups out, so the wait falls about as 1/√H.

    Args:
        num_workers: K.
        period: H, steps between two averagings.
        variation: standard deviation of a step's time, relative to its mean.
        rounds: how many to simulate.
        seed: of the simulation.

    Returns:
        1 when nobody waits.
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


def _check(num_workers: int) -> None:
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers}: at least 1")
