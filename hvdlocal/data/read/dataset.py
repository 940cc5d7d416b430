"""Reading a split: samples by index, at the speed of memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvdlocal.communicator.agreement import succeed_together
from hvdlocal.communicator.base import Communicator
from hvdlocal.communicator.single import SingleProcess
from hvdlocal.data.format.manifest import Manifest, split_directory
from hvdlocal.data.format.shard import Shard, StoredColumn
from hvdlocal.data.kinds import KINDS
from hvdlocal.data.kinds.base import Facts
from hvdlocal.data.kinds.tokens import with_block
from hvdlocal.data.read.opening import open_shards
from hvdlocal.data.read.storage import ClosedStorage, Layout, Region, Storage, open_storages
from hvdlocal.data.read.storage.base import cut_blocks

_INT64 = np.dtype(np.int64)  # comparing with it is many times as fast as comparing with the type np.int64


class StoredSamples:
    """Samples behind a storage: what `ShardedDataset` and a user's own HDF5 files have in common.

    Reading is safe from any number of threads, and so is closing. A pickle holds paths and settings, no data and no
    handles. What a communicator of more than one rank holds in mode "ram" is shared, and a process that unpickles the data
    set on the same node while the first is open reads the same memory. Without one the memory is private: then such a
    process, a spawned worker for example, makes a copy of its own. Mode "mmap" needs none.

    Attributes:
        kind: name of the kind of the samples: "images", all of one shape, or "jpeg".
        facts: what is true of all samples, by the names that the kind gives it in the manifest.
        tables: what is in memory of every sample, (n, …) by its name: for images "labels" and "index", int64 (n,), the
            position of each sample in the source data set.
        shuffled: whether blocks of neighbours, drawn at random, are a fair sample of all: the samples lie in random order, or
            they are windows of a stream.
    """

    kind: str
    facts: Facts
    tables: Mapping[str, NDArray[Any]]
    shuffled: bool

    def __init__(self, layouts: Sequence[Layout], storage: str, share: str, stream_bytes: int | None) -> None:
        self._layouts = layouts
        self._settings = (storage, share, stream_bytes)
        self._stored = int(layouts[0].extent_starts[-1])
        self._length = KINDS[self.kind].num_samples(self.facts, self._stored)
        self._open_lock = threading.Lock()
        self._opened: list[Storage] | None = None
        self._regions: Sequence[Region] = ()

    def __len__(self) -> int:
        return self._length

    @property
    def num_evaluated(self) -> int:
        """Number of samples of an evaluation: all there are. Windows of tokens are cut otherwise than for training."""
        return KINDS[self.kind].num_evaluated(self.facts, self._stored)

    def __enter__(self) -> StoredSamples:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def labels(self) -> NDArray[np.int32] | None:
        """int32 (n,), the number of the class of each sample; None where samples have no classes."""
        return self.tables.get("labels")

    @property
    def index(self) -> NDArray[np.int64] | None:
        """int64 (n,), position of each sample in the source data set; None where that is not recorded."""
        return self.tables.get("index")

    @property
    def dims(self) -> NDArray[np.uint16] | None:
        """uint16 (n, 2), height and width of each JPEG; None for other kinds."""
        return self.tables.get("dims")

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(height, width, channels) of every image; None for JPEGs and other kinds."""
        return self.facts.get("shape")

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label i means classes[i]. Empty where samples have no classes."""
        return self.facts.get("classes", ())

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of pixel / 255 over all images, per channel; empty for other kinds."""
        return self.facts.get("mean", ())

    @property
    def std(self) -> tuple[float, ...]:
        """Population standard deviation of pixel / 255 over all images, per channel; empty for other kinds."""
        return self.facts.get("std", ())

    @property
    def fingerprint(self) -> str:
        """Hex sha256 that identifies the data and their order."""
        raise NotImplementedError

    @property
    def chosen(self) -> dict[str, Any]:
        """The facts that the reader may have chosen, which the fingerprint does not cover: of tokens the `block`."""
        return {name: self.facts[name] for name in KINDS[self.kind].chosen}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def storage(self) -> str:
        """Where the bytes lie: "ram", "mmap" or "stream"."""
        return self._storages[0].mode

    @property
    def block_starts(self) -> NDArray[np.int64]:
        """int64 (blocks + 1,): block b is made of the samples block_starts[b]..block_starts[b + 1]-1.

        Blocks are what `stream` reads at once: 1 to 2 MiB of one shard. They depend on the sizes of the data alone, not
        on the storage.
        """
        return KINDS[self.kind].block_starts(self.facts, self._layouts[0].block_starts)

    @property
    def num_bytes(self) -> int:
        """Bytes of all samples."""
        return sum(layout.total_bytes for layout in self._layouts)

    @property
    def stream_bytes(self) -> int | None:
        """What this process holds at most of a set that is streamed; None in the other modes."""
        rooms: list[Any] = [getattr(storage, "capacity_bytes", None) for storage in self._storages]
        return None if None in rooms else sum(rooms)

    def describe(self) -> str:
        """Where the bytes lie and why, for a log."""
        return self._storages[0].describe()

    def take(self, indices: ArrayLike, out: Any = None) -> Any:
        """Gathers samples.

        Args:
            indices: integers (n,) in 0..len(self)-1, in any order, repeats allowed.
            out: what to fill; allocated if not given. For images C-contiguous uint8 (n, H, W, C).

        Returns:
            The samples; `out` if it was given.

        Raises:
            ValueError: the arguments do not fit, the kind of samples is not gathered (JPEGs are decoded), or the bytes read
                are damaged (a `DamagedDataError`).
            OSError: the file system cannot read them.
        """
        return KINDS[self.kind].take(self, self._checked(indices), out)

    def gather(self, rows: NDArray[np.int64], out: NDArray[Any], column: int = 0) -> None:
        """Fills `out`, C-contiguous (n, …), with samples of one size; int64 `rows` (n,) are known to be in range."""
        if len(rows):
            self._storages[column].gather(rows, out.reshape(len(rows), -1).view(np.uint8))

    def bytes_of(self, sample: int, column: int = 0) -> memoryview:
        """The bytes of one sample, read-only: a JPEG as it was stored, or the pixels of an image.

        Args:
            sample: its index.
            column: which of its data, where there are several.

        Raises:
            ValueError: there is no such sample, or its bytes are damaged.
        """
        return self._storages[column].view(*self._positions(sample, column))

    def name_of(self, sample: int, column: int = 0) -> str:
        """Where a sample lies, for messages: "train-00002-of-00004.h5 sample 17 (bytes 123..456)"."""
        start, stop = self._positions(sample, column)
        layout = self._layouts[column]
        number = int(np.searchsorted(layout.extent_starts, sample, side="right")) - 1
        extent = layout.extents[number]
        shift = extent.data_offset - int(layout.bounds[number])
        within = sample - int(layout.extent_starts[number])
        return f"{extent.path.name} sample {within} (bytes {start + shift}..{stop + shift - 1})"

    def read_ahead(self, samples: ArrayLike) -> None:
        """Announces that these samples (integers (n,)) will be wanted, in this order. Returns at once.

        Only a set that is streamed needs it, and reads their blocks in the background.
        """
        rows = KINDS[self.kind].stored(self.facts, self._checked(samples, self.num_evaluated))
        for storage in self._storages:
            storage.read_ahead(rows)

    def close(self) -> None:
        """Releases memory and files. Arrays and views that were handed out stay valid."""
        with self._open_lock:
            opened, self._opened = self._opened, [ClosedStorage(layout, "closed") for layout in self._layouts]
        for storage in opened or ():
            storage.close()

    @property
    def _storages(self) -> list[Storage]:
        """One for each column of the samples."""
        return self._opened or self._open(SingleProcess())

    def _open(self, communicator: Communicator) -> list[Storage]:
        with self._open_lock:
            if self._opened is None:
                self._opened = open_storages(
                    self._layouts, self._settings[0], communicator, *self._settings[1:], self._regions
                )
            return self._opened

    def _checked(self, indices: ArrayLike, length: int | None = None) -> NDArray[np.int64]:
        length = self._length if length is None else length
        rows = np.asarray(indices)
        if rows.dtype != _INT64:
            if rows.dtype.kind not in "iu" and rows.size:
                raise ValueError(
                    f"indices are {rows.dtype} {rows.shape}; a one-dimensional array of integers is needed"
                )
            rows = rows.astype(np.int64)
        if rows.ndim != 1:
            raise ValueError(f"indices are {rows.dtype} {rows.shape}; a one-dimensional array of integers is needed")
        if not rows.flags.c_contiguous:
            rows = np.ascontiguousarray(rows)
        # Seen as unsigned, what is negative is too large: one comparison less.
        if len(rows) and rows.view(np.uint64).max() >= length:
            raise ValueError(f"indices {rows.min()}..{rows.max()} leave the data set of {length} samples")
        return rows

    def _positions(self, sample: int, column: int) -> tuple[int, int]:
        if not 0 <= sample < self._length:
            raise ValueError(f"sample {sample} leaves the data set of {len(self)} samples")
        if KINDS[self.kind].cut_when_read:
            raise ValueError(f"samples of kind {self.kind!r} are not stored one by one: use take()")
        layout = self._layouts[column]
        if layout.sample_bounds is None:
            assert layout.sample_bytes is not None
            return sample * layout.sample_bytes, (sample + 1) * layout.sample_bytes
        return int(layout.sample_bounds[sample]), int(layout.sample_bounds[sample + 1])


class ShardedDataset(StoredSamples):
    """One split of a data set, opened for reading.

    Labels, index and checksums lie in memory, the samples where `storage` says; no HDF5 handle stays open.

    Args:
        directory: where the data set lives.
        split: name of the split, e.g. "train".
        storage: "ram": in memory, one copy per node. "mmap": mapped from their files; for local disks. "stream": read in
            large blocks while they are used; for sets that exceed memory, with Loader's order "block". "auto": the first
            of these that fits.
        communicator: the ranks that read this split together; None for this process alone. Construction is a collective,
            each shard is opened by one rank only, and mistakes are reported on all.
        share: how mode "ram" is filled. "node": each node reads all shards. "job": each shard is read by one rank of the
            job and broadcast, which spares the file system and loads the network.
        stream_bytes: what this process may hold of a set that is streamed; by default a quarter of the free memory, over
            the ranks of the node.
        block: T, the tokens of a sequence, for a data set of tokens; by default as it was prepared.

    Raises:
        FileNotFoundError: there is no finished data set, or one of its shards is missing.
        ValueError: a shard is truncated, damaged, or does not belong to the manifest; the message names the file. Or the
            storage is impossible. (With a communicator all errors are ValueErrors, the same on every rank.)
    """

    shuffled = True

    def __init__(
        self,
        directory: str | Path,
        split: str = "train",
        *,
        storage: Literal["auto", "ram", "mmap", "stream"] = "auto",
        communicator: Communicator | None = None,
        share: Literal["node", "job"] = "node",
        stream_bytes: int | None = None,
        block: int | None = None,
    ) -> None:
        communicator = communicator or SingleProcess()
        self._arguments = (Path(directory), split, block)
        self._load(communicator, storage, share, stream_bytes)
        self._open(communicator)

    def _load(self, communicator: Communicator, storage: str, share: str, stream_bytes: int | None) -> None:
        directory, split, block = self._arguments
        self._manifest, self._shards = open_shards(split_directory(directory, split), communicator, (storage, share))
        shards = self._shards
        self.kind = self._manifest.kind
        kind = KINDS[self.kind]

        def facts() -> Facts:
            found = {**self._manifest.facts, **self._manifest.statistics}
            chosen = found if block is None else with_block(kind.name, found, block)
            kind.num_samples(chosen, self._manifest.num_samples)
            return chosen

        self.facts = succeed_together(communicator, facts, "hvdlocal.data.facts")
        self.tables = {name: np.concatenate([shard.tables[name] for shard in shards]) for name in kind.per_sample}
        self.tables |= {name: shards[0].tables[name] for name in kind.shared}
        super().__init__(_layouts(shards), storage, share, stream_bytes)

    @property
    def manifest(self) -> Manifest:
        """The manifest of the split."""
        return self._manifest

    @property
    def fingerprint(self) -> str:
        """Hex sha256 that identifies the data and their order."""
        return self._manifest.fingerprint

    def verify(self) -> None:
        """Reads all files and compares every checksum. Raises ValueError naming the first damaged shard and samples."""
        for shard in self._shards:
            shard.verify()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "arguments": self._arguments,
            "settings": self._settings,
            "fingerprint": self.fingerprint,
            "regions": regions_of(self._opened),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._arguments = state["arguments"]
        self._load(SingleProcess(), *state["settings"])
        if self.fingerprint != state["fingerprint"]:  # labels would be the new ones, shared memory the old
            raise written_again(split_directory(*self._arguments[:2]))
        self._regions = state["regions"]  # the storage is opened when it is first read


def written_again(path: Path) -> ValueError:
    """What to raise when a pickle finds other data than those it was made of."""
    return ValueError(f"{path} was written again since this data set was opened; open it again")


def regions_of(storages: Iterable[Storage] | None) -> list[Region]:
    """Where another process of the node finds the same bytes in memory, for a pickle; empty if nowhere."""
    regions = [getattr(storage, "region", None) for storage in storages or ()]
    return [region for region in regions if region is not None]


def _layouts(shards: Sequence[Shard]) -> list[Layout]:
    """How the columns of all shards follow each other, one layout for each."""
    starts = np.cumsum([0] + [shard.num_samples for shard in shards], dtype=np.int64)
    blocks = None
    if len(shards[0].columns) > 1:  # samples that are read together come with the same block
        blocks = [cut_blocks(np.sum([column.unit_bounds for column in shard.columns], axis=0)) for shard in shards]
    return [
        Layout(extents, extents[0].column.sample_bytes, _sample_bounds(extents), starts, blocks)
        for extents in zip(*(shard.columns for shard in shards), strict=True)
    ]


def _sample_bounds(columns: Sequence[StoredColumn]) -> NDArray[np.int64] | None:
    """Position of each sample where they have different sizes, and the end."""
    bounds = np.cumsum([0] + [column.data_bytes for column in columns], dtype=np.int64)
    offsets = [column.column.offsets for column in columns]
    parts = [part[:-1] + base for part, base in zip(offsets, bounds, strict=False) if part is not None]
    return np.append(np.concatenate(parts), bounds[-1]) if parts else None
