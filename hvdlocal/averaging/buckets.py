"""Where the gradients of a step lie in one flat buffer, and the buckets in which they travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from hvdlocal.averaging.flat_buffer import FlatViews, aligned

BUCKET_BYTES = 25 * 2**20
"""The default size of a bucket."""

SMALL_BUCKET_BYTES = 2**20
"""What may wait for the end of the backward pass, as nothing hides the last bucket; and what is not worth a collective more."""

MOST_SHARE = 8
"""A bucket has at most one part in so many of the gradients: when it is complete, this much is left to hide it behind."""

_FLOAT_BYTES = 4


class Flag(IntEnum):
    """Why sums that have begun during the backward pass are not those of the gradients; each a number of ranks."""

    LATE = 0  # a gradient arrived for which a bucket had not waited
    CHANGED = 1  # a gradient changed after it had arrived
    UNSCALED = 2  # a GradScaler's factor was divided out after the backward pass


@dataclass(frozen=True)
class Bucket:
    """Gradients that travel together.

    Attributes:
        parameters: their places in the list of parameters.
        message: their place in the flat buffer, which the last bucket shares with the scalars.
    """

    parameters: range
    message: slice


class BucketLayout:
    """The layout of the flat buffer: gradients in the order of the parameters, and scalars.

    A backward pass computes the gradients in about the reverse order, so the first bucket is the end of the buffer. The last one
    is the beginning, with the model's first parameters and the scalars:

        [ flags, scalars | gradients: last bucket | … | first bucket ]        or, as one bucket, [ gradients | scalars ]

    Attributes:
        views: places of the gradients within `gradients`.
        gradients, scalars, flags: places in the flat buffer; one bucket has no flags.
        numel: its elements.
        buckets: in the order in which they travel.

    Args:
        parameters: whose gradients travel.
        scalars: numbers that travel with the last bucket.
        bucket_bytes: the most bytes of a bucket, as far as single parameters are not larger; None for one bucket. Buckets are
            smaller when there would be fewer than eight, but not below 1 MiB for that, and the last one has at most 1 MiB.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], scalars: int, bucket_bytes: int | None) -> None:
        self.views = FlatViews(parameters)
        starts = self.views.starts
        ends = [0] if bucket_bytes is None else _boundaries(starts, bucket_bytes)
        several = len(ends) > 1
        flags = len(Flag) if several else 0
        first = aligned(flags + scalars) if several else 0
        self.numel = first + self.views.numel + (0 if several else scalars)
        self.gradients = slice(first, first + self.views.numel)
        self.flags = slice(0, flags)
        self.scalars = slice(flags, flags + scalars) if several else slice(self.views.numel, self.numel)
        self.buckets, end = [], len(parameters)
        for begin in ends:
            message = slice(first + starts[begin] if begin else 0, first + starts[end] if several else self.numel)
            self.buckets.append(Bucket(range(begin, end), message))
            end = begin


def _boundaries(starts: Sequence[int], bucket_bytes: int) -> list[int]:
    """The first parameter of each bucket, in the order in which the buckets travel.

    Args:
        starts: where each parameter begins and the last one ends, in floats.
        bucket_bytes: the most bytes of a bucket.
    """
    small = SMALL_BUCKET_BYTES // _FLOAT_BYTES
    size = min(bucket_bytes // _FLOAT_BYTES, max(starts[-1] // MOST_SHARE, small))
    last = min(size, small)
    count = len(starts) - 1
    tail = max([1, *(i for i in range(1, count + 1) if starts[i] <= last)])
    boundaries, end = [], count
    for i in reversed(range(tail, count)):
        if starts[end] - starts[i] > size and end > i + 1:
            boundaries.append(i + 1)
            end = i + 1
    return [*boundaries, *([tail] if end > tail else []), 0]
