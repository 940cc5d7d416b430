"""The cost of summing a gradient in buckets while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class BucketArrival:
    """A part of the gradient that is summed in one collective.

    Attributes:
        ready: share of the backward pass after which its last gradient is there, from 0 to 1.
        bytes: its size.
    """

    ready: float
    bytes: int


@dataclass(frozen=True)
class SumTime:
    """The seconds of a sum as a function of its length, α + n/β.

    Attributes:
        latency: α, seconds of a very short sum.
        per_byte: 1/β, seconds of each byte.
    """

    latency: float
    per_byte: float

    @classmethod
    def through(cls, latency: float, num_bytes: int, seconds: float) -> SumTime:
        """Returns the line through two measurements: of a very short sum, and of one of `num_bytes` bytes."""
        return cls(min(latency, seconds), max(seconds - latency, 0.0) / num_bytes)

    def __call__(self, num_bytes: float) -> float:
        """Returns the seconds of a sum of this many bytes."""
        return self.latency + num_bytes * self.per_byte


def exposed_seconds(backward: float, buckets: Sequence[BucketArrival], seconds: Callable[[int], float]) -> float:
    """Returns the seconds by which the sums of a gradient outlast the backward pass.

    A sum begins when its bucket is complete and the sum before it has ended; all have the network to themselves. A backward pass
    that is long enough hides all of them but the last. One bucket is complete at the end, and hides nothing.

    Args:
        backward: seconds of the backward pass.
        buckets: in the order in which they are completed.
        seconds: the time of one sum as a function of its bytes, such as a `SumTime`.
    """
    end = 0.0
    for bucket in buckets:
        end = max(end, bucket.ready * backward) + seconds(bucket.bytes)
    return max(end - backward, 0.0)


def even_buckets(num_bytes: int, bucket_bytes: int) -> list[BucketArrival]:
    """Returns the buckets of a gradient whose bytes come evenly over the backward pass; all are full but the last.

    Args:
        num_bytes: of the whole gradient.
        bucket_bytes: the most bytes of a bucket.
    """
    ends = [*range(bucket_bytes, num_bytes, bucket_bytes), num_bytes]
    return [BucketArrival(end / num_bytes, end - start) for start, end in pairwise([0, *ends])]
