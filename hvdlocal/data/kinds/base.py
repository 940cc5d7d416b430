"""What a kind of samples must say for its data sets to be written, checked, opened and read in batches."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:  # a manifest can be read without torch
    from torch import Tensor

    from hvdlocal.data.augment import Crop

Batch = tuple[Any, Any]
"""(inputs, targets): each a tensor whose first axis counts the samples, or several such tensors by their names."""

Facts = Mapping[str, Any]
"""A part of a manifest by its keys, with tuples where JSON has lists."""


@dataclass(frozen=True, eq=False)
class Column:
    """A contiguous HDF5 dataset of a shard that holds data of all of its samples, one after the other.

    Its checksums each cover one *unit*: the bytes of a run of samples.

    Attributes:
        name: of the HDF5 dataset, which may lie in a group.
        dtype, shape: of the HDF5 dataset; little-endian.
        unit_starts: int64 (units + 1,), the first sample of each unit, and the number of samples.
        offsets: int64 (samples + 1,), where the bytes of each sample begin, and their end; None if all have one size.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    unit_starts: NDArray[np.int64]
    offsets: NDArray[np.int64] | None = None

    @property
    def num_bytes(self) -> int:
        """Length of the data."""
        return self.dtype.itemsize * int(np.prod(self.shape))

    @property
    def sample_bytes(self) -> int | None:
        """Size of every sample; None where sizes differ."""
        return self.num_bytes // int(self.unit_starts[-1]) if self.offsets is None else None

    @property
    def unit_bounds(self) -> NDArray[np.int64]:
        """int64 (units + 1,), bounds of the units within the bytes of the data."""
        sample_bytes = self.sample_bytes
        if sample_bytes is not None:
            return self.unit_starts * sample_bytes
        assert self.offsets is not None
        return self.offsets[self.unit_starts]


def units_of(samples: int, per_unit: int) -> NDArray[np.int64]:
    """The first sample of each unit of `per_unit` samples, and `samples`; the last unit may be shorter."""
    return np.append(np.arange(0, samples, per_unit, dtype=np.int64), samples)


@dataclass(frozen=True, eq=False)
class Selection:
    """The samples of a batch.

    Attributes:
        samples: int64 (n,), indices of the samples.
        keys: uint64 (n,), 64 random bits for each, which depend on (seed, epoch, sample) alone.
        epochs: int64 (n,), the epoch that each is drawn in; 0 for an evaluation.
        seed: of the order.
        evaluation: whether these are samples of an evaluation, which takes all there are, in order.
    """

    samples: NDArray[np.int64]
    keys: NDArray[np.uint64]
    epochs: NDArray[np.int64]
    seed: int
    evaluation: bool = False


@dataclass(frozen=True)
class Effort:
    """What it took to read samples: bytes, seconds to get at them, and seconds to decode them."""

    bytes: int = 0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class Assembly:
    """The work for one batch: `parts`, at least one, in any order and at the same time; then `finish` gives the batch."""

    parts: Sequence[Callable[[], Effort]]
    finish: Callable[[], Batch]


class Empty(Protocol):
    """Makes an uninitialised contiguous tensor on the CPU, in memory from which the device can be reached fast."""

    def __call__(self, shape: Sequence[int], dtype: DTypeLike, /) -> Tensor:
        """Makes one of the torch type that corresponds to a NumPy type."""


class Samples(Protocol):
    """What a kind needs of an open data set (`StoredSamples`) to read samples.

    Attributes:
        facts: what the manifest says of all samples: the kind's facts and statistics.
        tables: the tables `Kind.per_sample` by their names, (samples, …) each, and `Kind.shared`.
    """

    @property
    def facts(self) -> Facts: ...
    @property
    def tables(self) -> Mapping[str, NDArray[Any]]: ...

    def gather(self, rows: NDArray[np.int64], out: NDArray[Any], column: int = 0) -> None:
        """Fills `out`, C-contiguous (n, …), with samples of one size; int64 `rows` (n,) are known to be in range."""

    def bytes_of(self, sample: int, column: int = 0) -> memoryview:
        """The bytes of one sample, read-only."""

    def name_of(self, sample: int, column: int = 0) -> str:
        """Where a sample lies, for messages."""


class Kind(ABC):
    """How samples of one kind are stored and read. It keeps no state; `hvdlocal.data.kinds.KINDS` lists one object of each.

    A manifest consists of what all have in common, `facts`, which are known before the first sample is read, and
    `statistics`, which are found while the samples are written. A shard consists of columns with the data, and of
    tables that are read when it is opened; one of these, "crc32", holds the checksums of all units of the
    columns, one column after the other. Several columns have the same units.

    What the manifest counts as samples need not be what a reader gets: a kind may cut its samples out of what is
    stored when they are read (windows of a stream of tokens, for example). Then `num_samples` and
    `block_starts` translate, `batch` finds the place of each sample from `Selection` (its epoch and seed included),
    and the number of samples must be the same in every epoch, since the order of a run depends on it.

    Attributes:
        name: in the manifest, and `ShardedDataset.kind`.
        facts, statistics: keys of the manifest, in the order in which they are written.
        per_sample: names of the tables with an entry for each sample, which an open data set offers as `tables`.
        shared: names of the tables that are equal in all shards, which an open data set offers as `tables`, too.
        named_in_fingerprint: whether the manifest's fingerprint covers the name.
        shuffled: whether a writer lays the samples in random order, so that neighbours are a fair sample of all.
        cut_when_read: whether samples are cut out of what is stored when they are read.
        chosen: names of the facts that a reader may choose otherwise than the writer, and that determine what a sample is.
        takes_crop: whether batches need a `Crop`, and have several parts.
    """

    name: ClassVar[str]
    facts: ClassVar[tuple[str, ...]]
    statistics: ClassVar[tuple[str, ...]]
    per_sample: ClassVar[tuple[str, ...]]
    shared: ClassVar[tuple[str, ...]] = ()
    named_in_fingerprint: ClassVar[bool] = True
    shuffled: ClassVar[bool] = True
    cut_when_read: ClassVar[bool] = False
    chosen: ClassVar[tuple[str, ...]] = ()
    takes_crop: ClassVar[bool] = False

    # The manifest

    @abstractmethod
    def sound(self, facts: Facts) -> Mapping[str, bool]:
        """Whether each of the kind's facts and statistics is one that a writer writes; they come from a file."""

    @abstractmethod
    def least_bytes(self, facts: Facts) -> int:
        """The least number of bytes that a sample takes in a shard."""

    @abstractmethod
    def combine(self, parts: Sequence[Any]) -> dict[str, Any]:
        """The statistics of a split from what was counted in its shards (as it came back from JSON)."""

    # A shard

    def sealed(self, facts: Facts) -> dict[str, Any]:
        """What every shard carries the sha256 of, by the attribute that holds it, so that no other manifest fits it."""
        return {"facts_sha256": {"kind": self.name, **{name: facts[name] for name in self.facts}}}

    @abstractmethod
    def tables(self, facts: Facts, samples: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tables of a shard of so many samples: dtype and shape by name, in the order in the file."""

    def digested(self, names: Iterable[str]) -> Iterable[str]:
        """The names of the tables in the order in which they enter the shard's sha256."""
        return names

    @abstractmethod
    def columns(self, facts: Facts, samples: int, tables: Mapping[str, NDArray[Any]]) -> list[Column]:
        """The columns of a shard. Raises ValueError, "/offsets that …", if tables of these shapes do not describe any."""

    def check_tables(self, facts: Facts, tables: Mapping[str, NDArray[Any]]) -> None:  # noqa: B027  (anything may be valid)
        """Raises ValueError, "labels that …", if the tables hold what no writer writes."""

    # Reading

    def contents(self, facts: Facts, stored: int) -> str:
        """How much is stored, for people."""
        return f"{stored} samples"

    def num_samples(self, facts: Facts, stored: int) -> int:
        """How many samples a reader gets of those that are stored; the same in every epoch.

        Raises:
            ValueError: the facts do not fit what is stored, or what the reader chose does not fit the facts.
        """
        return stored

    def num_evaluated(self, facts: Facts, stored: int) -> int:
        """How many samples an evaluation gets."""
        return self.num_samples(facts, stored)

    def stored(self, facts: Facts, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where samples lie: which of those that are stored a batch of them, of any epoch, may read."""
        return samples

    def block_starts(self, facts: Facts, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first sample of each block, ascending, and their number: of the blocks of samples as stored."""
        return starts

    @abstractmethod
    def take(self, samples: Samples, rows: NDArray[np.int64], out: Any = None) -> Any:
        """What `ShardedDataset.take` returns of samples that are in range. Raises ValueError if `out` does not fit."""

    @abstractmethod
    def batch(
        self,
        samples: Samples,
        selection: Selection,
        crop: Crop | None,
        empty: Empty,
    ) -> Assembly:
        """How the batch of a selection is made.

        Args:
            samples: the open data set.
            selection: the samples of the batch.
            crop: given exactly if `takes_crop`.
            empty: makes the tensors of the batch.
        """


def timed(read: Callable[[], int]) -> Callable[[], Effort]:
    """A part of a batch that reads: `read` returns the number of bytes."""

    def part() -> Effort:
        began = time.perf_counter()
        return Effort(read(), time.perf_counter() - began)

    return part


def is_whole(value: Any, least: int) -> bool:
    """Whether a value from a file is an integer (a bool is none), and not too small."""
    return type(value) is int and value >= least


def is_share(value: Any) -> bool:
    """Whether a value from a file is a number from 0 to 1."""
    return type(value) in (int, float) and 0 <= value <= 1
