"""From sample indices to batches on a device, ahead of the consumer."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdlocal.data.buffer_pool import BufferPool
from hvdlocal.data.load.prefetch import Job, prefetch

if TYPE_CHECKING:
    from hvdlocal.data.augment import Crop, Mix, Transform
    from hvdlocal.data.read.dataset import StoredSamples

Batch = tuple[Tensor, Tensor]
Selection = tuple[NDArray[np.int64], NDArray[np.uint64]]
"""Sample indices and random keys, (n,) each."""

_JPEGS_PER_PART = 8  # several parts per batch, so that all threads work on the batch that is wanted next


@dataclass
class Effort:
    """What it took to read samples: bytes, seconds to get at them, and seconds to decode them."""

    bytes: int = 0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass
class Stats(Effort):
    """Cumulative counters of batches handed out."""

    wait_seconds: float = 0.0
    samples: int = 0

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
        depth: batches prepared ahead.
        read_ahead: samples that are announced to a storage of mode "stream" before they are read.
    """

    dataset: StoredSamples
    crop: Crop | None
    transform: Transform | None
    mix: Mix | None
    device: torch.device
    depth: int = 2
    threads: int | None = None
    read_ahead: int = 0
    _recycler: BufferPool = field(default_factory=BufferPool, init=False, repr=False)

    def __post_init__(self) -> None:
        jpeg = self.dataset.kind == "jpeg"
        if jpeg and self.crop is None:
            raise ValueError(
                "the data set holds JPEGs of many sizes, so crop is needed: RandomResizedCrop for training, CenterCrop for "
                "evaluation"
            )
        if not jpeg and self.crop is not None:
            raise ValueError("crop is for JPEGs, but these images have one size; put the crop into transform")
        if self.depth < 1:
            raise ValueError(f"prefetch is {self.depth}; at least one batch must be prepared ahead")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; choose at least 1, or None for this rank's cores less one")

    def batches(self, plan: Iterator[Selection], stats: Stats) -> Generator[Batch, None, None]:
        """The batches of a plan, in its order whatever the threads, counted in `stats` as they are handed out."""
        if self.dataset.storage == "stream":
            plan = _announced(plan, self.dataset.read_ahead, self.read_ahead)
        jobs = (self._job(*selection) for selection in plan)
        threads = self.threads or default_threads()
        if self.crop is None:
            # A batch is one part, and no more than these are under way: other threads would only be woken up, and every wake-up
            # takes Python's lock from the loop that launches a GPU's kernels.
            threads = min(threads, self.depth + 1)
        on_cpu = self.device.type == "cpu"
        with closing(prefetch(jobs, self.depth, threads=threads, initialize=self._initialize)) as items:
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
                images, labels, keys, effort = item
                del item
                stats.samples += len(keys)
                stats.bytes += effort.bytes
                stats.read_seconds += effort.read_seconds
                stats.decode_seconds += effort.decode_seconds
                if not on_cpu:
                    # Here and not in the thread: these must be enqueued on the stream that the consumer computes on.
                    images = images.to(self.device, non_blocking=True)
                    labels = labels.to(self.device, non_blocking=True)
                    images, labels = self._augment(images, labels, keys)
                yield images, labels
                del images, labels

    def _initialize(self) -> None:
        """Runs first in every background thread."""
        torch.set_num_threads(1)  # the threads are the parallelism; each with a team of its own would fight for cores
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # pinning would otherwise open a context on GPU 0 from every rank

    def _augment(self, images: Tensor, labels: Tensor, keys: NDArray[np.uint64]) -> Batch:
        if self.transform is not None:
            images = self.transform(images, keys)
        if self.mix is not None:
            images, labels = self.mix(images, labels, keys)
        return images, labels

    def _job(
        self, samples: NDArray[np.int64], keys: NDArray[np.uint64]
    ) -> Job[tuple[Tensor, Tensor, NDArray[np.uint64], Effort]]:
        dataset, crop, n = self.dataset, self.crop, len(samples)
        pinned = self.device.type == "cuda"
        shape = dataset.shape if crop is None else (crop.size, crop.size, 3)
        assert shape is not None
        images = self._recycler.empty((n, *shape), torch.uint8, pinned)
        pixels = images.numpy()
        efforts: list[Effort] = []

        def gather() -> None:
            began = time.perf_counter()
            dataset.take(samples, out=pixels)
            efforts.append(Effort(pixels.nbytes, time.perf_counter() - began))

        if crop is None:
            parts: list[Callable[[], None]] = [gather]
        else:
            from hvdlocal.data.read.decode import decode_crops  # and with it OpenCV, which nobody but JPEGs needs

            def decode(part: slice) -> Callable[[], None]:
                return lambda: efforts.append(Effort(*decode_crops(dataset, samples[part], boxes[part], pixels[part])))

            assert dataset.dims is not None
            boxes = crop.boxes(dataset.dims[samples], keys)
            parts = [decode(slice(i, i + _JPEGS_PER_PART)) for i in range(0, max(n, 1), _JPEGS_PER_PART)]

        def finish() -> tuple[Tensor, Tensor, NDArray[np.uint64], Effort]:
            labels = torch.empty(n, dtype=torch.int64, device="cpu", pin_memory=pinned)
            labels.numpy()[:] = dataset.labels[samples]
            batch = images, labels
            if self.device.type == "cpu":
                batch = self._augment(images, labels, keys)
            effort = Effort(
                sum(effort.bytes for effort in efforts),
                sum(effort.read_seconds for effort in efforts),
                sum(effort.decode_seconds for effort in efforts),
            )
            return *batch, keys, effort

        return Job(parts, finish)


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
        announce(selection[0])
        waiting.append(selection)
        samples += len(selection[0])
        while samples > distance:
            selection = waiting.popleft()
            samples -= len(selection[0])
            yield selection
    yield from waiting
