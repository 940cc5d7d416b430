"""Reading a split: samples by index, at the speed of memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvdlocal.communicator.base import Communicator
from hvdlocal.communicator.single import SingleProcess
from hvdlocal.data.format.manifest import Kind, split_directory
from hvdlocal.data.format.shard import Shard
from hvdlocal.data.read.opening import open_shards
from hvdlocal.data.read.storage import ClosedStorage, Layout, Region, Storage, open_storage

# Checks are made for every batch; comparing with a dtype is many times as fast as comparing with the type np.int64.
_INT64, _UINT8 = np.dtype(np.int64), np.dtype(np.uint8)


class StoredSamples:
    """Samples with labels behind a storage: what `ShardedDataset` and a user's own HDF5 files have in common.

    Reading is safe from any number of threads, and so is closing. A pickle holds paths and settings, no data and no
    handles. What a communicator of more than one rank holds in mode "ram" is shared, and a process that unpickles the data
    set on the same node while the first is open reads the same memory. Without one the memory is private: then such a
    process, a spawned worker for example, makes a copy of its own. Mode "mmap" needs none.

    Attributes:
        kind: "images", all of one shape, or "jpeg".
        labels: int32 (n,).
        index: int64 (n,), position of each sample in the source data set.
        dims: uint16 (n, 2), height and width of each JPEG; None for images.
        shuffled: whether the samples lie in random order, so that neighbours are a fair sample of the classes.
    """

    kind: Kind
    labels: NDArray[np.int32]
    index: NDArray[np.int64]
    dims: NDArray[np.uint16] | None
    shuffled: bool

    def __init__(self, layout: Layout, storage: str, share: str, stream_bytes: int | None) -> None:
        self._layout = layout
        self._settings = (storage, share, stream_bytes)
        self._open_lock = threading.Lock()
        self._opened: Storage | None = None
        self._region: Region | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __enter__(self) -> StoredSamples:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(height, width, channels) of every image; None for JPEGs."""
        raise NotImplementedError

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label i means classes[i]."""
        raise NotImplementedError

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of pixel / 255 over all samples, per channel."""
        raise NotImplementedError

    @property
    def std(self) -> tuple[float, ...]:
        """Population standard deviation of pixel / 255 over all samples, per channel."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """Hex sha256 that identifies the data and their order."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def storage(self) -> str:
        """Where the bytes lie: "ram", "mmap" or "stream"."""
        return self._storage.mode

    @property
    def block_starts(self) -> NDArray[np.int64]:
        """int64 (blocks + 1,): block b is made of the samples block_starts[b]..block_starts[b + 1]-1.

        Blocks are what `stream` reads at once: 1 to 2 MiB of one shard. They depend on the sizes of the data alone, not
        on the storage.
        """
        return self._layout.block_starts

    @property
    def num_bytes(self) -> int:
        """Bytes of all samples."""
        return self._layout.total_bytes

    @property
    def stream_bytes(self) -> int | None:
        """What this process holds at most of a set that is streamed; None in the other modes."""
        return getattr(self._storage, "capacity_bytes", None)

    def describe(self) -> str:
        """Where the bytes lie and why, for a log."""
        return self._storage.describe()

    def take(self, indices: ArrayLike, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Gathers images.

        Args:
            indices: integers (n,) in 0..len(self)-1, in any order, repeats allowed.
            out: C-contiguous uint8 (n, H, W, C) to fill; allocated if not given.

        Returns:
            `out`, uint8 (n, H, W, C).

        Raises:
            ValueError: the arguments do not fit, or the bytes read are damaged (a `DamagedDataError`).
            OSError: the file system cannot read them.
        """
        image_shape = self.shape
        if image_shape is None:
            raise ValueError(
                "these samples are JPEGs, which are not gathered but decoded: use Loader with a crop, or bytes_of()"
            )
        rows = self._checked(indices)
        shape = (len(rows), *image_shape)
        if out is None:
            out = np.empty(shape, np.uint8)
        elif out.shape != shape or out.dtype != _UINT8 or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}; C-contiguous uint8 {shape} is needed")
        if len(rows):
            self._storage.gather(rows, out.reshape(len(rows), -1))
        return out

    def bytes_of(self, sample: int) -> memoryview:
        """The bytes of one sample, read-only: a JPEG as it was stored, or the pixels of an image.

        Raises:
            ValueError: there is no such sample, or its bytes are damaged.
        """
        return self._storage.view(*self._positions(sample))

    def name_of(self, sample: int) -> str:
        """Where a sample lies, for messages: "train-00002-of-00004.h5 sample 17 (bytes 123..456)"."""
        start, stop = self._positions(sample)
        number = int(np.searchsorted(self._layout.extent_starts, sample, side="right")) - 1
        extent = self._layout.extents[number]
        shift = extent.data_offset - int(self._layout.bounds[number])
        within = sample - int(self._layout.extent_starts[number])
        return f"{extent.path.name} sample {within} (bytes {start + shift}..{stop + shift - 1})"

    def read_ahead(self, samples: ArrayLike) -> None:
        """Announces that these samples (integers (n,)) will be wanted, in this order. Returns at once.

        Only a set that is streamed needs it, and reads their blocks in the background.
        """
        self._storage.read_ahead(self._checked(samples))

    def close(self) -> None:
        """Releases memory and files. Arrays and views that were handed out stay valid."""
        with self._open_lock:
            opened, self._opened = self._opened, ClosedStorage(self._layout, "closed")
        if opened is not None:
            opened.close()

    @property
    def _storage(self) -> Storage:
        return self._opened or self._open(SingleProcess())

    def _open(self, communicator: Communicator) -> Storage:
        with self._open_lock:
            if self._opened is None:
                storage, share, stream_bytes = self._settings
                self._opened = open_storage(self._layout, storage, communicator, share, stream_bytes, self._region)
            return self._opened

    def _checked(self, indices: ArrayLike) -> NDArray[np.int64]:
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
        if len(rows) and rows.view(np.uint64).max() >= len(self.labels):
            raise ValueError(f"indices {rows.min()}..{rows.max()} leave the data set of {len(self)} samples")
        return rows

    def _positions(self, sample: int) -> tuple[int, int]:
        if not 0 <= sample < len(self.labels):
            raise ValueError(f"sample {sample} leaves the data set of {len(self)} samples")
        layout = self._layout
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
    ) -> None:
        communicator = communicator or SingleProcess()
        self._arguments = (Path(directory), split)
        self._load(communicator, storage, share, stream_bytes)
        self._open(communicator)

    def _load(self, communicator: Communicator, storage: str, share: str, stream_bytes: int | None) -> None:
        directory, split = self._arguments
        self._manifest, self._shards = open_shards(split_directory(directory, split), communicator, (storage, share))
        shards = self._shards
        self.kind = self._manifest.kind
        self.labels = np.concatenate([shard.labels for shard in shards])
        self.index = np.concatenate([shard.index for shard in shards])
        dims = [shard.dims for shard in shards if shard.dims is not None]
        self.dims = np.concatenate(dims) if dims else None
        super().__init__(_layout(shards, self.shape), storage, share, stream_bytes)

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(height, width, channels) of every image; None for JPEGs."""
        return self._manifest.shape

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label i means classes[i]."""
        return self._manifest.classes

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of pixel / 255 over the split, per channel."""
        return self._manifest.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Population standard deviation of pixel / 255 over the split, per channel."""
        return self._manifest.std

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
            "region": region_of(self._opened),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._arguments = state["arguments"]
        self._load(SingleProcess(), *state["settings"])
        if self.fingerprint != state["fingerprint"]:  # labels would be the new ones, shared memory the old
            raise written_again(split_directory(*self._arguments))
        self._region = state["region"]  # the storage is opened when it is first read


def written_again(path: Path) -> ValueError:
    """What to raise when a pickle finds other data than those it was made of."""
    return ValueError(f"{path} was written again since this data set was opened; open it again")


def region_of(storage: Storage | None) -> Region | None:
    """Where another process of the node finds the same bytes in memory, for a pickle; None if nowhere."""
    return getattr(storage, "region", None)


def _layout(shards: Sequence[Shard], shape: tuple[int, int, int] | None) -> Layout:
    starts = np.cumsum([0] + [len(shard.labels) for shard in shards], dtype=np.int64)
    if shape is not None:
        return Layout(shards, int(np.prod(shape)), None, starts)
    bounds = np.cumsum([0] + [shard.data_bytes for shard in shards], dtype=np.int64)
    parts = [
        shard.offsets[:-1] + base for shard, base in zip(shards, bounds, strict=False) if shard.offsets is not None
    ]
    return Layout(shards, None, np.append(np.concatenate(parts), bounds[-1]), starts)
