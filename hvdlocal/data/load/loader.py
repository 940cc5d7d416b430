"""Batches for one rank: from sample positions to tensors on the training device."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hvdlocal.data.kinds.base import Batch, Selection
from hvdlocal.data.load.order import OrderMode
from hvdlocal.data.load.partition import Partition, Tail, check_batch, require_samples, resolve_order
from hvdlocal.data.load.pipeline import Pipeline, Stats, resolve_device
from hvdlocal.data.random_keys import sample_keys

if TYPE_CHECKING:
    from hvdlocal.data.augment import Crop, Mix, Transform
    from hvdlocal.data.read.dataset import StoredSamples


class Loader:
    """Batches of one rank, walking along the endless sequence order_0 ++ order_1 ++ … of a data set.

    Every global batch is the next `num_workers * batch_size` samples of that sequence, and rank r takes every
    num_workers-th of them from the r-th on. So the global batches do not depend on the number of ranks, every rank
    makes the same number of steps, and any sample can meet any rank in any epoch.

    `for images, labels in loader` is one epoch: it ends when the cursor has reached or crossed the next epoch edge,
    and the next loop goes on from there. `endless()` never ends. Only the latest iteration is valid; they share one
    cursor.

    A batch is `(images, labels)`: what `transform` makes of the uint8 (batch_size, H, W, C) images (those
    themselves without one), and int64 (batch_size,) labels, or what `mix` makes of both; on `device`. The loader never
    writes to tensors that somebody still holds.

    Args:
        dataset: the split to read.
        batch_size: samples per batch of this rank.
        rank: this rank's number, 0..num_workers-1.
        num_workers: K, the number of ranks that train: the word of the papers. It has nothing to do with loader
            processes, of which there are none; background threads work ahead.
        seed: seed of the order and of the augmentation; the same on every rank.
        order: "global": a random permutation every epoch. "block": a permutation that reads neighbouring samples together,
            see `hvdlocal.data.load.order.block_permutation`. "replacement": independent draws: an epoch is only a length.
            "auto": "block" for a data set that is streamed, else "global".
        tail: "carry": batches run across the epoch edge, every sample comes exactly once per epoch. "partial": so does it,
            but an epoch ends at its edge, with a last global batch that is split among the ranks to within one sample; what
            would not give every rank a sample joins the batch before, so no batch is empty.
            "drop": an epoch leaves out the samples (other ones each time) that do not fill a global batch.
        crop: which part of a JPEG is decoded, and at what size; needed for data sets of JPEGs, refused for others.
        transform: see `Transform`; on the CPU it runs in a background thread, on a GPU on the device.
        mix: see `Mix`; the labels become float (batch_size, num_classes).
        device: where the batches are wanted.
        prefetch: number of batches prepared ahead, at least 1.
        threads: background threads that read, decode and (on the CPU) transform; by default this rank's cores, as its
            affinity and OMP_NUM_THREADS have it, less one.

    Raises:
        ValueError: an argument is out of range, or with "drop" the data set does not fill one global batch.
    """

    def __init__(
        self,
        dataset: StoredSamples,
        batch_size: int,
        *,
        rank: int = 0,
        num_workers: int = 1,
        seed: int = 0,
        order: OrderMode | Literal["auto"] = "auto",
        tail: Tail = "carry",
        crop: Crop | None = None,
        transform: Transform | None = None,
        mix: Mix | None = None,
        device: str | torch.device = "cpu",
        prefetch: int = 2,
        threads: int | None = None,
    ) -> None:
        require_samples(dataset, "Loader")
        self._plan = Partition(
            dataset,
            batch_size,
            rank=rank,
            num_workers=num_workers,
            seed=seed,
            order=resolve_order(order, dataset),
            tail=tail,
        )
        self.dataset = dataset
        self.batch_size = batch_size
        self.rank = rank
        self.num_workers = num_workers
        self.seed = seed
        self.transform = transform
        self.device = resolve_device(device)
        self.prefetch = prefetch
        self.global_batch_size = self._plan.global_batch_size
        self.samples_per_epoch = self._plan.samples_per_epoch
        window = -(-self._plan.order.window_samples // num_workers)
        _warn_if_read_twice(dataset, self._plan.order.mode, window)
        read_ahead = max(window, 2 * batch_size)
        self._pipeline = Pipeline(
            dataset,
            crop,
            transform,
            mix,
            self.device,
            _stored_bytes(dataset, batch_size),
            prefetch,
            threads,
            read_ahead,
        )
        self._samples_consumed = 0
        self._stats = Stats()
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
    def order(self) -> OrderMode:
        """The order that the samples have: "global", "block" or "replacement"."""
        return self._plan.order.mode

    @property
    def steps_per_epoch(self) -> float:
        """Batches per epoch, on average: with tail="carry" it is in general no whole number."""
        return self._plan.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """Batches up to the next epoch edge."""
        epochs_begun = self._samples_consumed // self.samples_per_epoch + 1
        return self._batches(epochs_begun * self.samples_per_epoch)

    def endless(self) -> Generator[Batch, None, None]:
        """Batches without end."""
        return self._batches(None)

    def stats(self) -> dict[str, float]:
        """Cumulative counters of this rank, of batches handed out.

        `wait_seconds` that the consumer waited for the background threads, `samples`, and `bytes` read; seconds that
        the threads spent, added up over them: `read_seconds` for getting at the bytes (from a streamed data set that
        includes waiting for the disk) and `decode_seconds` for decoding JPEGs; `decode_rate`, in samples per second of
        one thread.
        """
        return self._stats.as_dict()

    def count_from(self, stats: Mapping[str, float]) -> None:
        """Adds the `stats` of an earlier part of the run to what is counted from here on."""
        self._stats = Stats(**{field.name: stats[field.name] for field in fields(Stats)})  # type: ignore[arg-type]

    def samples_of(self, rank: int, since: int) -> int:
        """The number of samples that a rank has been given since `samples_consumed` had an earlier value."""
        return self._plan.samples_of(rank, since, self._samples_consumed)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: the same on every rank, so one copy is enough."""
        return self._plan.state(self._samples_consumed)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken; iterations begun before are over. The number of workers may differ: the
        sample sequence goes on all the same, and with the same global batch size so do the global batches.

        Raises:
            ValueError: the state belongs to other data, another seed, order or tail, or another length of an epoch.
        """
        self._samples_consumed = self._plan.cursor(state)
        self._latest = object()

    def _batches(self, stop: int | None) -> Generator[Batch, None, None]:
        self._latest = this = object()
        return self._walk(this, stop)

    def _walk(self, this: object, stop: int | None) -> Generator[Batch, None, None]:
        batches = self._pipeline.batches(self._selections(self._samples_consumed, stop), self._stats)
        with closing(batches):
            while self._latest is this:
                batch = next(batches, None)
                if batch is None:
                    return
                self._samples_consumed += self._plan.size(self._samples_consumed)
                yield batch
                del batch
        raise RuntimeError("this iteration of the loader is over: a later one was begun, or a state was loaded")

    def _selections(self, cursor: int, stop: int | None) -> Iterator[Selection]:
        while stop is None or cursor < stop:
            samples, epochs = self._plan.selection(cursor)
            yield Selection(samples, sample_keys(self.seed, epochs, samples), epochs, self.seed)
            cursor += self._plan.size(cursor)


def _warn_if_read_twice(dataset: StoredSamples, order: OrderMode, window: int) -> None:
    """A streamed set whose room does not hold the window in use and the next one gives the right samples, but slowly."""
    room = dataset.stream_bytes
    if room is not None and order != "block" and dataset.num_bytes > room:
        warnings.warn(
            f"order={order!r} reads a block for almost every sample of a streamed data set; choose order='block'",
            stacklevel=3,
        )
    if room is not None and (needed := 2 * window * dataset.num_bytes // len(dataset)) > room:
        warnings.warn(
            f"two windows of the streamed data set take {needed / 2**20:.0f} MiB on this rank, but it may hold "
            f"{room / 2**20:.0f} MiB: blocks will be read more than once. Start fewer ranks per node, or raise stream_bytes.",
            stacklevel=3,
        )


def evaluation_batches(
    dataset: StoredSamples,
    batch_size: int,
    *,
    rank: int = 0,
    num_workers: int = 1,
    crop: Crop | None = None,
    transform: Transform | None = None,
    device: str | torch.device = "cpu",
    threads: int | None = None,
) -> Iterator[Batch]:
    """One pass over the data set, in its order on disk: every sample exactly once over all ranks, none repeated.

    Rank r of K gets the samples r*N//K to (r+1)*N//K, so ranks differ by at most one sample and possibly by a batch:
    reduce sums and counts, not means. The last batch may be smaller.

    Args, batches, errors: see `Loader`.
    """
    require_samples(dataset, "evaluation_batches")
    check_batch(batch_size, rank, num_workers)
    n = dataset.num_evaluated
    first, last = rank * n // num_workers, (rank + 1) * n // num_workers
    edges = itertools.pairwise([*range(first, last, batch_size), last])
    ranges = (np.arange(start, stop) for start, stop in edges)
    plan = (_drawn_in_epoch_0(samples) for samples in ranges)
    batch_bytes = _stored_bytes(dataset, batch_size)
    pipeline = Pipeline(
        dataset, crop, transform, None, resolve_device(device), batch_bytes, threads=threads, read_ahead=4 * batch_size
    )
    return pipeline.batches(plan, Stats())


def _stored_bytes(dataset: StoredSamples, batch_size: int) -> int:
    return batch_size * dataset.num_bytes // len(dataset)


def _drawn_in_epoch_0(samples: NDArray[np.int64]) -> Selection:
    epochs = np.zeros_like(samples)
    return Selection(samples, sample_keys(0, epochs, samples), epochs, 0, evaluation=True)
