"""Batches for one rank: from sample positions to tensors on the training device."""

import itertools
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdlocal.data.augment import Transform
from hvdlocal.data.dataset import ShardedDataset
from hvdlocal.data.keys import sample_keys
from hvdlocal.data.order import SampleSequence
from hvdlocal.data.prefetch import prefetch

Batch = tuple[Tensor, Tensor]

_STATE_VERSION = 1


@dataclass
class _Stats:
    wait_seconds: float = 0.0
    bytes: int = 0
    samples: int = 0


class Loader:
    """Batches of one rank, walking along the endless sequence perm_0 ++ perm_1 ++ … of a data set.

    Every global batch is the next ``num_workers * batch_size`` samples of that sequence, and rank r takes every
    num_workers-th of them from the r-th on. So the global batches do not depend on the number of ranks, every rank
    makes the same number of steps, and any sample can meet any rank in any epoch.

    ``for images, labels in loader`` is one epoch: it ends when the cursor has reached or crossed the next epoch edge,
    and the next loop goes on from there. ``endless()`` never ends. Only the latest iteration is valid; they share one
    cursor.

    A batch is ``(images, labels)``: what ``transform`` makes of the uint8 (batch_size, H, W, C) images (those
    themselves without one), and int64 (batch_size,) labels, both on ``device``. The tensors are fresh: the loader
    never writes to them again.

    Args:
        dataset: the split to read.
        batch_size: samples per batch of this rank.
        rank: this rank's number, 0..num_workers-1.
        num_workers: K, the number of ranks that train: the word of the papers. It has nothing to do with loader
            processes, of which there are none; one background thread works ahead.
        seed: seed of the order and of the augmentation; the same on every rank.
        tail: "carry": batches run across the epoch edge, every sample comes exactly once per epoch. "drop": an epoch
            leaves out the samples (other ones each time) that do not fill a global batch.
        transform: see ``Transform``; on the CPU it runs in the background thread, on a GPU on the device.
        device: where the batches are wanted.
        prefetch: number of batches prepared ahead, at least 1.

    Raises:
        ValueError: an argument is out of range, or with "drop" the data set does not fill one global batch.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        batch_size: int,
        *,
        rank: int = 0,
        num_workers: int = 1,
        seed: int = 0,
        tail: Literal["carry", "drop"] = "carry",
        transform: Transform | None = None,
        device: str | torch.device = "cpu",
        prefetch: int = 2,
    ) -> None:
        _check_batch(batch_size, rank, num_workers)
        if tail not in ("carry", "drop"):
            raise ValueError(f"tail is {tail!r}; choose 'carry' or 'drop'")
        if prefetch < 1:
            raise ValueError(f"prefetch is {prefetch}; at least one batch must be prepared ahead")
        self.dataset = dataset
        self.batch_size = batch_size
        self.rank = rank
        self.num_workers = num_workers
        self.seed = seed
        self.transform = transform
        self.device = _resolve(device)
        self.prefetch = prefetch
        self.global_batch_size = num_workers * batch_size
        n = len(dataset)
        self.samples_per_epoch = n if tail == "carry" else n - n % self.global_batch_size
        if self.samples_per_epoch == 0:
            raise ValueError(
                f"{n} samples do not fill a global batch of {self.global_batch_size}; "
                "choose a smaller batch_size or tail='carry'"
            )
        self._sequence = SampleSequence(n, seed=seed, samples_per_epoch=self.samples_per_epoch)
        self._samples_consumed = 0
        self._stats = _Stats()
        self._latest = object()

    @property
    def samples_consumed(self) -> int:
        """Samples handed out so far, over all ranks; what is only prefetched does not count."""
        return self._samples_consumed

    @property
    def epoch(self) -> float:
        """Epochs handed out so far, with fraction."""
        return self._samples_consumed / self.samples_per_epoch

    @property
    def steps_per_epoch(self) -> float:
        """Batches per epoch, on average: with tail="carry" it is in general no whole number."""
        return self.samples_per_epoch / self.global_batch_size

    def __iter__(self) -> Iterator[Batch]:
        """Batches up to the next epoch edge."""
        epochs_begun = self._samples_consumed // self.samples_per_epoch + 1
        return self._batches(epochs_begun * self.samples_per_epoch)

    def endless(self) -> Generator[Batch, None, None]:
        """Batches without end."""
        return self._batches(None)

    def stats(self) -> dict[str, float]:
        """Cumulative counters of this rank, of batches handed out.

        ``wait_seconds`` that the consumer waited for the background thread, ``bytes`` of images gathered, and
        ``samples``.
        """
        return asdict(self._stats)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: the same on every rank, so one copy is enough."""
        return {
            "version": _STATE_VERSION,
            "fingerprint": self.dataset.fingerprint,
            "seed": self.seed,
            "samples_per_epoch": self.samples_per_epoch,
            "samples_consumed": self._samples_consumed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; iterations begun before are over. The number of workers may differ: the
        sample sequence goes on all the same, and with the same global batch size so do the global batches.

        Raises:
            ValueError: the state belongs to other data, another seed or another length of an epoch.
        """
        for name, mine in self.state_dict().items():
            if name != "samples_consumed" and state.get(name) != mine:
                raise ValueError(
                    f"the loader's state was saved with {name} {state.get(name)}, this loader has {mine}; "
                    "resume with the data set, seed, tail and (for tail='drop') global batch size of the saved run"
                )
        self._samples_consumed = state["samples_consumed"]
        self._latest = object()

    def _batches(self, stop: int | None) -> Generator[Batch, None, None]:
        self._latest = this = object()
        return self._walk(this, stop)

    def _walk(self, this: object, stop: int | None) -> Generator[Batch, None, None]:
        start, step = self._samples_consumed, self.global_batch_size
        cursors = itertools.count(start, step) if stop is None else iter(range(start, stop, step))
        batches = _load(self.dataset, self._plan(cursors), self.transform, self.device, self.prefetch, self._stats)
        with closing(batches):
            while self._latest is this:
                batch = next(batches, None)
                if batch is None:
                    return
                self._samples_consumed += step
                yield batch
        raise RuntimeError("this iteration of the loader is over: a later one was begun, or a state was loaded")

    def _plan(self, cursors: Iterable[int]) -> Iterator["_Selection"]:
        mine = np.arange(self.rank, self.global_batch_size, self.num_workers)
        for cursor in cursors:
            samples, epochs = self._sequence.at(cursor + mine)
            yield samples, sample_keys(self.seed, epochs, samples)


def evaluation_batches(
    dataset: ShardedDataset,
    batch_size: int,
    *,
    rank: int = 0,
    num_workers: int = 1,
    transform: Transform | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[Batch]:
    """One pass over the data set, in its order on disk: every sample exactly once over all ranks, none repeated.

    Rank r of K gets the samples r*N//K to (r+1)*N//K, so ranks differ by at most one sample and possibly by a batch:
    reduce sums and counts, not means. The last batch may be smaller.

    Args, batches, errors: see ``Loader``.
    """
    _check_batch(batch_size, rank, num_workers)
    n = len(dataset)
    samples = np.arange(rank * n // num_workers, (rank + 1) * n // num_workers)
    keys = sample_keys(0, np.zeros_like(samples), samples)
    plan = ((samples[i : i + batch_size], keys[i : i + batch_size]) for i in range(0, len(samples), batch_size))
    return _load(dataset, plan, transform, _resolve(device), 2, _Stats())


_Selection = tuple[NDArray[np.int64], NDArray[np.uint64]]
_HostBatch = tuple[Tensor, Tensor, NDArray[np.uint64]]


def _load(
    dataset: ShardedDataset,
    plan: Iterator[_Selection],
    transform: Transform | None,
    device: torch.device,
    depth: int,
    stats: _Stats,
) -> Generator[Batch, None, None]:
    """Turn (sample indices, keys) into batches, ``depth`` of them ahead of the consumer."""
    on_cpu, pinned = device.type == "cpu", device.type == "cuda"

    def gather() -> Iterator[_HostBatch]:
        if pinned:
            torch.cuda.set_device(device)  # per thread; pinning would otherwise open a context on GPU 0 from every rank
        for samples, keys in plan:
            # Allocated afresh, as somebody may still hold the last one; torch's pinned allocator recycles what nobody
            # uses.
            images = torch.empty((len(samples), *dataset.shape), dtype=torch.uint8, pin_memory=pinned)
            labels = torch.empty(len(samples), dtype=torch.int64, pin_memory=pinned)
            dataset.take(samples, out=images.numpy())
            labels.numpy()[:] = dataset.labels[samples]
            if on_cpu and transform is not None:
                images = transform(images, keys)
            yield images, labels, keys

    sample_bytes = int(np.prod(dataset.shape))
    with closing(prefetch(gather(), depth)) as batches:
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            stats.wait_seconds += time.perf_counter() - began
            if batch is None:
                return
            images, labels, keys = batch
            stats.samples += len(labels)
            stats.bytes += len(labels) * sample_bytes
            if not on_cpu:
                # Here and not in the thread: these must be enqueued on the stream that the consumer computes on.
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                if transform is not None:
                    images = transform(images, keys)
            yield images, labels


def _resolve(device: str | torch.device) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _check_batch(batch_size: int, rank: int, num_workers: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}; it is the number of ranks that train, at least 1")
    if not 0 <= rank < num_workers:
        raise ValueError(f"rank is {rank}; with num_workers {num_workers} it must lie in 0..{num_workers - 1}")
