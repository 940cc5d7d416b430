"""From sample indices to batches on a device, ahead of the consumer."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from hvdlocal.data.buffer_pool import BufferPool, torch_dtype
from hvdlocal.data.kinds import KINDS
from hvdlocal.data.kinds.base import Batch, Effort, Selection
from hvdlocal.data.load.prefetch import Job, prefetch

if TYPE_CHECKING:
    from hvdlocal.data.augment import Crop, Mix, Transform
    from hvdlocal.data.read.dataset import StoredSamples

T = TypeVar("T")

_SMALL_BYTES = 1 << 14


@dataclass
class Stats:
    """Cumulative counters of batches handed out; see `Effort`."""

    bytes: int = 0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    wait_seconds: float = 0.0
    samples: int = 0

    def add(self, efforts: Sequence[Effort], samples: int) -> None:
        """Counts a batch."""
        self.samples += samples
        for effort in efforts:
            self.bytes += effort.bytes
            self.read_seconds += effort.read_seconds
            self.decode_seconds += effort.decode_seconds

    def as_dict(self) -> dict[str, float]:
        """The counters, and the rate of decoding in samples per second and thread (0 where nothing is decoded)."""
        return {
            "wait_seconds": self.wait_seconds,
            "samples": self.samples,
            "bytes": self.bytes,
            "read_seconds": self.read_seconds,
            "decode_seconds": self.decode_seconds,
            "decode_rate": self.samples / self.decode_seconds if self.decode_seconds else 0.0,
        }


@dataclass(frozen=True)
class Pipeline:
    """How samples become batches.

    Attributes:
        dataset: where they come from.
        crop, transform, mix, device, threads: see `Loader`.
        batch_bytes: size of a batch as it is stored.
        depth: batches prepared ahead.
        read_ahead: samples that are announced to a storage of mode "stream" before they are read.
    """

    dataset: StoredSamples
    crop: Crop | None
    transform: Transform | None
    mix: Mix | None
    device: torch.device
    batch_bytes: int
    depth: int = 2
    threads: int | None = None
    read_ahead: int = 0
    _recycler: BufferPool = field(default_factory=BufferPool, init=False, repr=False)

    def __post_init__(self) -> None:
        takes_crop = KINDS[self.dataset.kind].takes_crop
        if takes_crop and self.crop is None:
            raise ValueError(
                "the data set holds JPEGs of many sizes, so crop is needed: RandomResizedCrop for training, CenterCrop for "
                "evaluation"
            )
        if not takes_crop and self.crop is not None:
            raise ValueError(
                f"crop is for JPEGs, but these {self.dataset.kind} have one size; put the crop into transform"
            )
        if self.depth < 1:
            raise ValueError(f"prefetch is {self.depth}; at least one batch must be prepared ahead")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; choose at least 1, or None for this rank's cores less one")

    def batches(self, plan: Iterator[Selection], stats: Stats) -> Generator[Batch, None, None]:
        """The batches of a plan, in its order whatever the threads, counted in `stats` as they are handed out."""
        if self.dataset.storage == "stream":
            plan = _announced(plan, self.dataset.read_ahead, self.read_ahead)
        jobs = map(self._job, plan)
        threads = self.threads or default_threads()
        if self.crop is None:
            # A batch is one part, and no more than these are under way: other threads would only be woken up, and every wake-up
            # takes Python's lock from the loop that launches a GPU's kernels.
            threads = min(threads, self.depth + 1)
        on_cpu = self.device.type == "cpu"
        if on_cpu and self._at_once:
            made = (_do(job) for job in jobs)
        else:
            made = prefetch(jobs, self.depth, threads=threads, initialize=self._initialize)
        with closing(made) as items:
            first = True
            while True:
                began = time.perf_counter()
                item = next(items, None)
                stats.wait_seconds += time.perf_counter() - began
                if item is None:
                    return
                if first:
                    first = False
                    # What the threads set for themselves, torch also hands to every thread that begins later; undo that.
                    torch.set_num_threads(torch.get_num_threads())
                batch, keys, efforts = item
                del item
                stats.add(efforts, len(keys))
                if not on_cpu:
                    # Here and not in the thread: these must be enqueued on the stream that the consumer computes on.
                    inputs, targets = (_to(values, self.device) for values in batch)
                    batch = self._augment((inputs, targets), keys)
                    del inputs, targets
                yield batch
                del batch

    @property
    def _at_once(self) -> bool:
        """Whether batches are so small that making one takes less time than handing it over between threads."""
        plain = self.crop is None and self.transform is None and self.mix is None
        return plain and self.batch_bytes < _SMALL_BYTES and self.dataset.storage != "stream"

    def _initialize(self) -> None:
        """Runs first in every background thread."""
        torch.set_num_threads(1)  # the threads are the parallelism; each with a team of its own would fight for cores
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # pinning would otherwise open a context on GPU 0 from every rank

    def _augment(self, batch: Batch, keys: NDArray[np.uint64]) -> Batch:
        inputs, targets = batch
        if self.transform is not None:
            inputs = self.transform(inputs, keys)
        if self.mix is not None:
            inputs, targets = self.mix(inputs, targets, keys)
        return inputs, targets

    def _job(self, selection: Selection) -> Job[tuple[Batch, NDArray[np.uint64], list[Effort]]]:
        pinned = self.device.type == "cuda"

        def empty(shape: Sequence[int], dtype: DTypeLike) -> Tensor:
            return self._recycler.empty(shape, torch_dtype(dtype), pinned)

        assembly = KINDS[self.dataset.kind].batch(self.dataset, selection, self.crop, empty)
        efforts: list[Effort] = []

        def part(read: Callable[[], Effort]) -> Callable[[], None]:
            return lambda: efforts.append(read())

        def finish() -> tuple[Batch, NDArray[np.uint64], list[Effort]]:
            batch = assembly.finish()
            if self.device.type == "cpu":
                batch = self._augment(batch, selection.keys)
            return batch, selection.keys, efforts

        return Job([part(read) for read in assembly.parts], finish)


def _do(job: Job[T]) -> T:
    for part in job.parts:
        part()
    return job.finish()


def _to(values: Any, device: torch.device) -> Any:
    if isinstance(values, Tensor):
        return values.to(device, non_blocking=True)
    return {name: tensor.to(device, non_blocking=True) for name, tensor in values.items()}


def default_threads() -> int:
    """One less than the cores of this rank, at least 1: its CPU affinity, or torch's number of threads if that is smaller."""
    return max(1, min(len(os.sched_getaffinity(0)), torch.get_num_threads()) - 1)


def resolve_device(device: str | torch.device) -> torch.device:
    """The device with its number."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _announced(
    plan: Iterator[Selection], announce: Callable[[NDArray[np.int64]], None], distance: int
) -> Iterator[Selection]:
    """The plan, with everything announced when no more than `distance` samples come before it."""
    waiting: deque[Selection] = deque()
    samples = 0
    for selection in plan:
        announce(selection.samples)
        waiting.append(selection)
        samples += len(selection.samples)
        while samples > distance:
            selection = waiting.popleft()
            samples -= len(selection.samples)
            yield selection
    yield from waiting
