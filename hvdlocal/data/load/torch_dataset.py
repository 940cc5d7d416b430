"""The same data in the same order for people with a `torch.utils.data.DataLoader` of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor
from torch.utils import data

from hvdlocal.data.kinds import KINDS
from hvdlocal.data.kinds.base import Selection
from hvdlocal.data.load.order import OrderMode
from hvdlocal.data.load.partition import Partition, require_samples, resolve_order
from hvdlocal.data.random_keys import sample_keys

if TYPE_CHECKING:
    from hvdlocal.data.augment import Crop, Transform
    from hvdlocal.data.read.dataset import StoredSamples


class SampleIndex(int):
    """The index of a sample, with the epoch that it is drawn for, the seed, and the 64 random bits of its augmentation."""

    key: int
    epoch: int
    seed: int

    def __new__(cls, sample: int, key: int, epoch: int, seed: int) -> SampleIndex:
        """The index of `sample` with `key`, in an epoch of a seed."""
        index = super().__new__(cls, sample)
        index.key, index.epoch, index.seed = key, epoch, seed
        return index

    def __reduce__(self) -> tuple[type[SampleIndex], tuple[int, int, int, int]]:
        return SampleIndex, (int(self), self.key, self.epoch, self.seed)


class TorchDataset(data.Dataset[tuple[Any, Any]]):
    """A map-style dataset of (inputs, targets) of each sample, for `torch.utils.data.DataLoader`.

    Of images these are a uint8 (H, W, C) tensor, or what one of the transforms makes of that, and the label, an int; of
    other kinds what `Loader` has in a batch, without its first axis. A pickle holds paths, not handles, so worker
    processes may be spawned; in an MPI program they must be (`multiprocessing_context="spawn"`), as MPI and fork do not
    go together. `Loader` needs no processes and is faster.

    Args:
        dataset: a `ShardedDataset`, or a user's own file. With workers open it with storage="mmap" or "ram".
        crop: which part of a JPEG is decoded, and at what size; needed for data sets of JPEGs, refused for others.
        batch_transform: a `Transform` such as `CropFlip`, called with all images of a batch at once. Its randomness,
            like that of `crop`, is that of `Loader` if the indices come from an `EpochSampler`, else torch's.
        transform: anything else, called with each image, a uint8 (H, W, C) tensor of its own.

    Raises:
        ValueError: a crop is missing or not wanted, or both transforms are given.
    """

    def __init__(
        self,
        dataset: StoredSamples,
        *,
        crop: Crop | None = None,
        batch_transform: Transform | None = None,
        transform: Callable[[Tensor], Any] | None = None,
    ) -> None:
        require_samples(dataset, "TorchDataset")
        if (crop is None) == KINDS[dataset.kind].takes_crop:
            raise ValueError(
                f"crop is {crop}; it is needed for JPEGs and only for them, and the samples are {dataset.kind}"
            )
        if batch_transform is not None and transform is not None:
            raise ValueError("batch_transform and transform are both given; give one of them")
        self.dataset = dataset
        self.crop = crop
        self.batch_transform = batch_transform
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} leaves the data set of {len(self)} samples")  # which ends an iteration
        return self.__getitems__([index if index >= 0 else index + len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any]]:
        """The items of a batch, fetched at once; DataLoader calls this."""
        rows = np.array([int(index) for index in indices], np.int64)
        keyed = self.crop is not None or self.batch_transform is not None
        keys = _keys(indices) if keyed else np.empty(0, np.uint64)  # nothing else shall use up torch's randomness
        drawn = [index if isinstance(index, SampleIndex) else SampleIndex(index, 0, 0, 0) for index in indices]
        epochs, seed = np.array([index.epoch for index in drawn], np.int64), drawn[0].seed if drawn else 0
        selection = Selection(rows, keys, epochs, seed)
        assembly = KINDS[self.dataset.kind].batch(self.dataset, selection, self.crop, _empty)
        for part in assembly.parts:
            part()
        inputs, targets = assembly.finish()
        if self.batch_transform is not None:
            inputs = self.batch_transform(inputs, keys)
        items = _items(inputs)
        if self.transform is not None:
            items = [self.transform(item) for item in items]
        return list(zip(items, _items(targets), strict=True))


def _empty(shape: Sequence[int], dtype: DTypeLike) -> Tensor:
    return torch.from_numpy(np.empty(shape, dtype))


def _items(values: Any) -> list[Any]:
    """The inputs or targets of each sample; labels as ints."""
    if isinstance(values, dict):
        names = list(values)
        return [
            dict(zip(names, item, strict=True)) for item in zip(*(_items(values[name]) for name in names), strict=True)
        ]
    return values.tolist() if values.dtype == torch.int64 and values.ndim == 1 else list(values.unbind())


class EpochSampler(data.Sampler[int]):
    """The indices of one rank, epoch by epoch: exactly the samples that `Loader` with the same arguments gives.

    Every rank gets the same number of indices, a multiple of `batch_size`, and no sample is repeated to get there. Use it
    as `DataLoader(TorchDataset(dataset), batch_size, sampler=sampler)`, and call `set_epoch` before every epoch.

    Args:
        dataset: what is sampled: a `TorchDataset`, or what one is made of.
        batch_size: of this rank; the DataLoader's.
        rank: see `Loader`.
        num_workers: see `Loader`.
        seed: see `Loader`.
        order: see `Loader`.
        tail: "carry" or "drop", see `Loader`. With "carry" epochs end where `Loader`'s do, so their lengths differ by up
            to a global batch, and every sample comes once in each len(dataset) of the endless sequence.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dataset: TorchDataset | StoredSamples,
        batch_size: int,
        *,
        rank: int = 0,
        num_workers: int = 1,
        seed: int = 0,
        order: OrderMode | Literal["auto"] = "auto",
        tail: Literal["carry", "drop"] = "carry",
    ) -> None:
        if tail not in ("carry", "drop"):
            raise ValueError(
                f"tail is {tail!r}; a sampler can do 'carry' or 'drop', as a DataLoader knows no empty batches"
            )
        stored = dataset.dataset if isinstance(dataset, TorchDataset) else dataset
        require_samples(stored, "EpochSampler")
        self._plan = Partition(
            stored,
            batch_size,
            rank=rank,
            num_workers=num_workers,
            seed=seed,
            order=resolve_order(order, stored),
            tail=tail,
        )
        if self._plan.global_batch_size > self._plan.samples_per_epoch:
            raise ValueError(
                f"a global batch of {self._plan.global_batch_size} is more than the {self._plan.samples_per_epoch} samples of "
                "an epoch, so that some epochs would have no batch; choose a smaller batch_size or fewer ranks"
            )
        self.seed = seed
        self._epoch = self._start = 0
        self._offset = 0  # of the steps from multiples of the global batch: a run may have begun with another size

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that of epoch `epoch`, from 0; from its beginning, unless a state was loaded in it."""
        if epoch != self._epoch:
            self._epoch, self._start = epoch, self._edge(epoch)

    def __len__(self) -> int:
        return (self._edge(self._epoch + 1) - self._start) // self._plan.num_workers

    def __iter__(self) -> Iterator[int]:
        """The indices of the epoch that was set."""
        for cursor in range(self._start, self._edge(self._epoch + 1), self._plan.global_batch_size):
            samples, epochs = self._plan.selection(cursor)
            keys = sample_keys(self.seed, epochs, samples)
            for sample, key, epoch in zip(samples.tolist(), keys.tolist(), epochs.tolist(), strict=True):
                yield SampleIndex(sample, key, epoch, self.seed)

    def state_dict(self, batches: int = 0) -> dict[str, Any]:
        """Where the run stands; the same on every rank, and `Loader` understands it.

        Args:
            batches: batches of the last iteration that were trained with, over and above what it began with. A DataLoader
                fetches indices ahead, so nobody but the training loop knows.
        """
        return self._plan.state(self._start + batches * self._plan.global_batch_size)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration the rest of the epoch in which `state` was taken; set_epoch to it changes nothing.

        Raises:
            ValueError: the state belongs to other data, another seed, order or tail, or another length of an epoch.
        """
        self._start = self._plan.cursor(state)
        self._epoch = self._start // self._plan.samples_per_epoch
        self._offset = self._start % self._plan.global_batch_size

    def _edge(self, epoch: int) -> int:
        """The cursor at which epoch `epoch` begins: at its edge or in the step beyond, as for `Loader`."""
        step = self._plan.global_batch_size
        return self._offset + -(-(epoch * self._plan.samples_per_epoch - self._offset) // step) * step


def _keys(indices: Sequence[int]) -> NDArray[np.uint64]:
    keys = [
        index.key
        if isinstance(index, SampleIndex)
        else int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
        for index in indices
    ]
    return np.array(keys, np.uint64)
