"""Reading named arrays in a user's own files, HDF5 of any layout or .npz, as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hvdlocal.communicator.agreement import require_agreement, succeed_together
from hvdlocal.communicator.base import Communicator
from hvdlocal.communicator.single import SingleProcess
from hvdlocal.data.format.manifest import sha256_of_json
from hvdlocal.data.kinds.arrays import array_facts
from hvdlocal.data.read.dataset import StoredSamples, regions_of, written_again
from hvdlocal.data.read.named_arrays import (
    NamedArrays,
    extents_of,
    find_arrays,
    layout_of,
    named_by,
    obstacle_in,
)

_FINGERPRINT_BYTES = 32 << 20
_FINGERPRINT_SAMPLES = 256


def open_arrays(
    path: str | Path | Sequence[str | Path],
    inputs: str,
    targets: str,
    *,
    storage: Literal["auto", "ram", "mmap", "stream"] = "auto",
    communicator: Communicator | None = None,
    share: Literal["node", "job"] = "node",
    stream_bytes: int | None = None,
) -> UserArrays:
    """Opens arrays in files that somebody else wrote, as samples of kind "arrays".

    Arrays that lie in a file as they are, little-endian and in one piece, are mapped, staged or streamed. Others (chunked,
    compressed, big-endian, virtual …) are unpacked into memory once, a run of whole chunks at a time, or, if they exceed the
    memory, streamed and unpacked again in every epoch. `python -m data_prep arrays` makes shards of them, which are as fast
    as the first, have checksums, and lie in random order; the order of a user's own files is the owner's.

    Args:
        path: an HDF5 or .npz file, or several whose samples follow each other.
        inputs, targets: names of the arrays, separated by commas, each of numbers (N, …); of HDF5 with their groups: "fields/x".
        storage: see `ShardedDataset`.
        communicator: see `ShardedDataset`.
        share: see `ShardedDataset`.
        stream_bytes: see `ShardedDataset`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is neither HDF5 nor .npz, an array is missing, holds no numbers or was never written, arrays differ
            in length, or files in type or shape; or the storage is impossible. (With a communicator all errors are
            ValueErrors, the same on every rank.)
    """
    source = NamedArrays.of(path, inputs, targets)
    return UserArrays(source, communicator or SingleProcess(), storage, share, stream_bytes)


class UserArrays(StoredSamples):
    """Named arrays of a user's own files; made by `open_arrays`.

    Attributes:
        source: the files and names.
        named: what was found in them.
        obstacle: why the samples must be unpacked, "mine.h5: x is chunked or compressed"; None if they lie there as they are.
    """

    kind = "arrays"
    shuffled = False

    def __init__(
        self, source: NamedArrays, communicator: Communicator, storage: str, share: str, stream_bytes: int | None
    ) -> None:
        self._load(source, communicator, storage, share, stream_bytes)
        self._open(communicator)
        self._fingerprint = succeed_together(communicator, self._sampled, "hvdlocal.data.fingerprint")

    def _load(
        self, source: NamedArrays, communicator: Communicator, storage: str, share: str, stream_bytes: int | None
    ) -> None:
        require_agreement(communicator, {"storage": storage, "share": share}, "hvdlocal.data.storage")
        files = find_arrays(source, communicator)
        self.source = source
        self.named = named_by(source, files)
        dtypes_and_shapes = {
            name: (array.dtype, array.shape[1:]) for name, array in zip(source.names, files[0].arrays, strict=True)
        }
        self.facts = array_facts(dtypes_and_shapes, source.inputs, source.targets)
        starts = np.cumsum([0] + [file.num_samples for file in files], dtype=np.int64)
        self.tables = {"index": np.arange(starts[-1])}
        columns = extents_of(source, files)
        self.obstacle = obstacle_in(source, columns)
        layouts = [layout_of(extents, starts) for extents in columns]
        super().__init__(layouts, storage, share, stream_bytes)

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of names, types, shapes, and up to 256 samples (32 MiB) that are spread evenly over the files.

        It is the same however the arrays are laid out in files. A change of other samples does not show in it.
        """
        return self._fingerprint

    def describe(self) -> str:
        """Where the bytes lie and why, for a log, with a remedy if that costs time."""
        said = super().describe()
        if self.obstacle is None:
            return said
        when = "every start of a run" if self.storage == "ram" else "every epoch"
        return f"{said} ({self.obstacle}; that takes time at {when}, which python -m data_prep arrays saves)"

    def _sampled(self) -> str:
        sample_bytes = max(1, self.num_bytes // len(self))
        count = max(2, min(_FINGERPRINT_SAMPLES, _FINGERPRINT_BYTES // sample_bytes))
        rows = np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))
        digests = []
        for column, layout in enumerate(self._layouts):
            digest = hashlib.sha256()
            assert layout.sample_bytes is not None
            buffer = np.empty((1, layout.sample_bytes), np.uint8)
            for row in rows:
                self.gather(row[None], buffer, column)
                digest.update(buffer.data)
            digests.append(digest.hexdigest())
        return sha256_of_json({"facts": self.facts, "samples": len(self), "sha256": digests})

    def __getstate__(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "settings": self._settings,
            "fingerprint": self._fingerprint,
            "stamps": self._stamps(),
            "regions": regions_of(self._opened),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._load(state["source"], SingleProcess(), *state["settings"])
        if self._stamps() != state["stamps"]:
            raise written_again(self.source.paths[0])
        self._fingerprint = state["fingerprint"]
        self._regions = state["regions"]  # the storage is opened when it is first read

    def _stamps(self) -> list[tuple[str, int, int]]:
        """Size and time of the last change, in ns, of every file that samples lie in."""
        paths = sorted({extent.path for layout in self._layouts for extent in layout.extents})
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
