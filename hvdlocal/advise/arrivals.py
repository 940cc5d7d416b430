"""When the gradients of a model are there in the course of its backward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

import torch

from hvdlocal.averaging.buckets import Bucket
from hvdlocal.plan.overlap import BucketArrival


class GradientArrivals:
    """Notes when each gradient is there, as a share of the backward pass, by hooks on the parameters.

    Args:
        parameters: whose gradients are noted; all on one device.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._on_gpu = parameters[0].is_cuda
        self._shares: list[list[float]] = [[] for _ in parameters]
        self._moments: dict[int, float | torch.cuda.Event] = {}
        for i, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._note, i))

    def watch(self, backward: Callable[[], object]) -> None:
        """Makes a backward pass and notes the moments. A gradient that does not come counts as the last one."""
        self._moments.clear()
        start = self._now()
        backward()
        end = self._now()
        whole = self._seconds(start, end)
        for i, shares in enumerate(self._shares):
            shares.append(self._seconds(start, self._moments.get(i, end)) / whole)

    def of(self, buckets: Sequence[Bucket]) -> list[BucketArrival]:
        """Returns when each bucket is complete, the mean over all passes."""
        shares = [fmean(passes) for passes in self._shares]
        return [
            BucketArrival(max(shares[i] for i in bucket.parameters), 4 * (bucket.message.stop - bucket.message.start))
            for bucket in buckets
        ]

    def _note(self, i: int, parameter: torch.Tensor) -> None:
        self._moments[i] = self._now()

    def _now(self) -> float | torch.cuda.Event:
        """The moment at which the device has done what it was asked to do until now."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start
