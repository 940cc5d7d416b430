"""A rank's part in the order: its share of every global batch, and the resume state, valid for any number of ranks."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.load.order import EpochOrder, OrderMode, SampleSequence

if TYPE_CHECKING:
    from hvdlocal.data.read.dataset import StoredSamples

Tail = Literal["carry", "partial", "drop"]

_STATE_VERSION = 1


class Partition:
    """One rank's walk along the endless sequence order_0 ++ order_1 ++ … of a data set.

    A *cursor* is the number of samples that all ranks together have left behind; it fixes everything that comes.

    Args, errors: see `Loader`; `order` is never "auto" here.

    Attributes:
        samples_per_epoch: how much of each epoch's order is used.
        global_batch_size: samples of one step over all ranks.
    """

    def __init__(
        self,
        dataset: StoredSamples,
        batch_size: int,
        *,
        rank: int,
        num_workers: int,
        seed: int,
        order: OrderMode,
        tail: Tail,
    ) -> None:
        check_batch(batch_size, rank, num_workers)
        if tail not in get_args(Tail):
            raise ValueError(f"tail is {tail!r}; choose 'carry', 'partial' or 'drop'")
        n = len(dataset)
        self.rank = rank
        self.num_workers = num_workers
        self.tail = tail
        self.global_batch_size = num_workers * batch_size
        self.samples_per_epoch = n - n % self.global_batch_size if tail == "drop" else n
        if self.samples_per_epoch == 0:
            raise ValueError(
                f"{n} samples do not fill a global batch of {self.global_batch_size}; "
                "choose a smaller batch_size or tail='carry'"
            )
        if tail == "partial" and self.samples_per_epoch < num_workers:
            raise ValueError(f"{n} samples are fewer than the {num_workers} ranks; choose fewer ranks or tail='carry'")
        self.order = EpochOrder(order, seed, n, block_starts=dataset.block_starts if order == "block" else None)
        self._fingerprint = dataset.fingerprint
        self._chosen = dataset.chosen
        self._sequence = SampleSequence(self.order, samples_per_epoch=self.samples_per_epoch)

    @property
    def steps_per_epoch(self) -> float:
        """Batches per epoch, on average: with tail="carry" it is in general no whole number."""
        if self.tail == "partial":
            full, rest = divmod(self.samples_per_epoch, self.global_batch_size)
            return max(full + (rest >= self.num_workers), 1)
        return self.samples_per_epoch / self.global_batch_size

    def size(self, cursor: int) -> int:
        """Samples of the global batch at a cursor."""
        if self.tail != "partial":
            return self.global_batch_size
        rest = self.samples_per_epoch - cursor % self.samples_per_epoch
        if (
            rest < self.num_workers
        ):  # where another number of ranks left off: too few for all, so the next batch takes them
            return rest + self.size(cursor + rest)
        return rest if rest < self.global_batch_size + self.num_workers else self.global_batch_size

    def selection(self, cursor: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """This rank's samples of the global batch at a cursor, and the epoch of each: int64 (n,) each."""
        return self._sequence.at(cursor + np.arange(self.rank, self.size(cursor), self.num_workers))

    def samples_of(self, rank: int, start: int, end: int) -> int:
        """The number of samples that a rank takes of the global batches between two cursors."""
        count = 0
        while start < end:
            count += len(range(rank, self.size(start), self.num_workers))
            start += self.size(start)
        return count

    def state(self, cursor: int) -> dict[str, Any]:
        """A few integers and names, the same on every rank."""
        return {
            "version": _STATE_VERSION,
            "fingerprint": self._fingerprint,
            **self._chosen,
            **self.order.state,
            "samples_per_epoch": self.samples_per_epoch,
            "tail": self.tail,
            "samples_consumed": cursor,
        }

    def cursor(self, state: dict[str, Any]) -> int:
        """The cursor of a state. Raises ValueError if it belongs to other data, or to another order of them."""
        for name, mine in self.state(0).items():
            if name != "samples_consumed" and state.get(name) != mine:
                raise ValueError(
                    f"the loader's state was saved with {name} {state.get(name)}, this loader has {mine}; resume with the "
                    f"data set, {''.join(f'{name}, ' for name in self._chosen)}seed, order, tail and (for tail='drop') global "
                    "batch size of the saved run"
                )
        consumed = state.get("samples_consumed")
        if not isinstance(consumed, Integral) or consumed < 0:
            raise ValueError(f"the loader's state has samples_consumed {consumed!r}; it must be an integer, at least 0")
        return int(consumed)


def require_samples(dataset: object, taker: str) -> None:
    """Raises ValueError for what is no data set of hvdlocal, a torch `Subset` for example; `taker` is what it was given to."""
    if hasattr(dataset, "fingerprint"):
        return
    kind = type(dataset).__name__
    if kind == "TorchDataset":
        raise ValueError(f"{taker} takes what a TorchDataset is made of: give its attribute dataset")
    raise ValueError(
        f"{taker} takes a ShardedDataset, or what open_hdf5 gives, and not a {kind}: write the samples as a split of their own "
        "(ShardWriter), or use torch.utils.data.DistributedSampler with num_replicas and rank of the communicator, which "
        "repeats some samples"
    )


def check_batch(batch_size: int, rank: int, num_workers: int) -> None:
    """Raises ValueError for numbers that no rank can have."""
    for name, value in (("batch_size", batch_size), ("rank", rank), ("num_workers", num_workers)):
        if not isinstance(value, Integral):
            raise ValueError(f"{name} is {value!r}; it must be an integer")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}; it is the number of ranks that train, at least 1")
    if not 0 <= rank < num_workers:
        raise ValueError(f"rank is {rank}; with num_workers {num_workers} it must lie in 0..{num_workers - 1}")


def resolve_order(order: OrderMode | Literal["auto"], dataset: StoredSamples) -> OrderMode:
    """What "auto" means: "block" where the storage reads block by block, "global" where any sample is as near as the next.

    Raises:
        ValueError: neither will do, as the samples are streamed but do not lie in random order.
    """
    if order != "auto":
        return order
    if dataset.storage != "stream":
        return "global"
    if not dataset.shuffled:
        raise ValueError(
            "the data set is streamed, and its samples do not lie in random order, so that blocks of neighbours are no fair "
            "samples: write it as shards (python -m data_prep, or ShardWriter), or choose order='block' or (slow) "
            "order='global' knowingly"
        )
    return "block"
