"""Writing a split of named arrays as HDF5 shards."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvdlocal.communicator import require_agreement, succeed_together
from hvdlocal.data.format.extent import READ_BYTES
from hvdlocal.data.format.manifest import Manifest, ShardEntry
from hvdlocal.data.kinds.array_statistics import Moments
from hvdlocal.data.kinds.arrays import array_facts, is_array_name, repeated, stored_dtype
from hvdlocal.data.kinds.numbers import require_numbers
from hvdlocal.data.write.shard_writer import write_shard
from hvdlocal.data.write.split_writer import SplitWriter
from hvdlocal.data.write.staging import Receipt

_READ_BYTES = 32 << 20  # of one array at a time: an HDF5 source is slow at small selections


class ArraySource(Protocol):
    """An array (N, …) that can be read by an ascending int64 index array: ndarray, memmap, h5py dataset …"""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape; the first axis counts the samples."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the numbers."""

    def __getitem__(self, rows: NDArray[np.int64], /) -> ArrayLike:
        """The samples with the given, ascending indices."""


class ArrayWriter(SplitWriter):
    """Writes one split of a data set of named arrays as HDF5 shards, laid out and restartable as by `ShardWriter`.

    The arrays are never in memory as a whole. Their numbers are stored as they are, little-endian; the manifest states
    mean, standard deviation and range of each. A compressed HDF5 dataset is slow as a source, since samples are read in
    random order; `python -m data_prep arrays` unpacks it first.

    Args:
        directory: where the data set lives; created if need be.
        split: name of the split, e.g. "train".
        inputs, targets: names of the arrays, at least one of each.
        keep_nonfinite: whether numbers that are NaN or infinite are stored, with a warning, instead of refused.
        options: the other arguments of `SplitWriter`.

    Raises:
        ValueError: a name is missing, comes twice, or cannot be one.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str,
        *,
        inputs: Sequence[str],
        targets: Sequence[str],
        keep_nonfinite: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(directory, split, **options)
        for role, names in (("inputs", inputs), ("targets", targets)):
            if isinstance(names, str) or not names:
                raise ValueError(f"{role} is {names!r}; give a list of at least one name of an array")
            for name in names:
                if not is_array_name(name):
                    raise ValueError(f"{name!r} in {role} cannot be the name of an array; give one such as 'density'")
        names = [*inputs, *targets]
        for clash in repeated(names):
            if names.count(clash) > 1:
                raise ValueError(f"{clash!r} is named twice in inputs and targets; each array needs a name of its own")
            group = next(name for name in names if clash.startswith(f"{name}/"))
            raise ValueError(f"{clash!r} lies in {group!r}, which is an array itself and no group; rename one of them")
        self.inputs = tuple(inputs)
        self.targets = tuple(targets)
        self.keep_nonfinite = keep_nonfinite

    def write(
        self,
        arrays: Mapping[str, ArraySource],
        *,
        identity: str | None = None,
        preparation: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Writes the split and returns its manifest; as `ShardWriter.write`, restartable in the same way.

        Args:
            arrays: the named arrays, (N, …) each: bool, integers of 8 to 64 bits, or floats of 16 to 64 bits.
            identity: what identifies the content of `arrays`; by default a hash of all of it, for which they are read
                once more, by all ranks in turn.
            preparation: facts that the manifest shall record.

        Raises:
            ValueError: an array is missing, holds anything else, or is of another length than the others; N < num_shards;
                or numbers are not finite and `keep_nonfinite` is not set.
            FileExistsError: a different data set is there and `overwrite` is not set.
        """
        names = [*self.inputs, *self.targets]
        communicator = self._communicator
        succeed_together(communicator, lambda: self._check(arrays, names), "data.check")
        facts = array_facts(
            {name: (arrays[name].dtype, arrays[name].shape[1:]) for name in names}, self.inputs, self.targets
        )
        samples = arrays[names[0]].shape[0]
        require_agreement(communicator, {"the arrays": facts, "their length": samples}, "data.arrays")
        if identity is None:
            identity = self._look_through(arrays, names)
        draft = self._draft("arrays", facts, {"source": identity, "samples": samples})
        unit = facts["samples_per_checksum"]

        def write(path: Path, name: str, rows: NDArray[np.int64]) -> Receipt:
            moments = {array["name"]: Moments() for array in facts["arrays"]}
            data = [
                self._units(arrays[array["name"]], stored_dtype(array), rows, unit, moments[array["name"]])
                for array in facts["arrays"]
            ]
            sha256 = write_shard(path, draft, len(rows), data, {"index": rows})
            self._refuse_unusable(moments)
            self._tell(len(rows))
            entry = ShardEntry(name, len(rows), path.stat().st_size, sha256)
            return Receipt(entry, {name: found.as_dict() for name, found in moments.items()})

        manifest = self._write_split(draft, samples, write, preparation or {})
        kept = {name: one for name, one in manifest.statistics["statistics"].items() if one["nan"] or one["inf"]}
        for name, one in kept.items() if communicator.rank == 0 else ():
            warnings.warn(
                f"{name} holds {one['nan']} NaN and {one['inf']} infinite numbers, which are kept", stacklevel=2
            )
        return manifest

    def _check(self, arrays: Mapping[str, ArraySource], names: Sequence[str]) -> None:
        for name in names:
            if name not in arrays:
                raise ValueError(f"array {name!r} is missing among {', '.join(arrays) or 'no arrays'}")
            _check_array(name, arrays[name])
        first = names[0]
        samples = arrays[first].shape[0]
        for name in names:
            if arrays[name].shape[0] != samples:
                raise ValueError(
                    f"{first} has {samples} samples and {name} has {arrays[name].shape[0]}; every sample needs one of each"
                )
        self._require_samples(samples, "samples")

    def _look_through(self, arrays: Mapping[str, ArraySource], names: Sequence[str]) -> str:
        """The sha256 of all numbers; a collective in which each rank reads every size-th piece.

        Raises ValueError, with their number, if numbers are not finite and must not be kept.
        """
        communicator = self._communicator
        digests, found = [], {name: Moments() for name in names}
        for name in names:
            pieces = list(_pieces(arrays[name]))

            def look(array: ArraySource = arrays[name], pieces: list[NDArray[np.int64]] = pieces) -> list[Any]:
                return [_look_at(np.asarray(array[rows])) for rows in pieces[communicator.rank :: communicator.size]]

            everyone = communicator.gather(succeed_together(communicator, look, "data.look"), "data.pieces")
            for number in range(len(pieces)):
                digest, nan, inf = everyone[number % communicator.size][number // communicator.size]
                digests.append(digest)
                found[name].merge(Moments(nan=nan, inf=inf))
        self._refuse_unusable(found)
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def _refuse_unusable(self, moments: Mapping[str, Moments]) -> None:
        for name, found in moments.items():
            if (found.nan or found.inf) and not self.keep_nonfinite:
                raise ValueError(
                    f"{name} holds {found.nan} NaN and {found.inf} infinite numbers, of which no model learns: remove these "
                    "samples, or keep them knowingly with keep_nonfinite=True (data_prep: --keep-nonfinite)"
                )
            if found.max is not None and found.max >= 2**63 and isinstance(found.max, int):
                raise ValueError(f"{name} holds {found.max}, which no tensor of integers can have: write it as float64")

    def _units(
        self, array: ArraySource, dtype: np.dtype[Any], rows: NDArray[np.int64], unit: int, moments: Moments
    ) -> Iterator[NDArray[Any]]:
        """The samples of the given rows in units, counted on their way; read in larger pieces."""
        sample_bytes = dtype.itemsize * math.prod(array.shape[1:])
        step = unit * max(1, _READ_BYTES // (unit * sample_bytes))
        for start in range(0, len(rows), step):
            wanted = rows[start : start + step]
            ascending = np.argsort(wanted)  # h5py and files read by ascending index only, or best
            piece = np.empty((len(wanted), *array.shape[1:]), dtype)
            piece[ascending] = array[wanted[ascending]]
            for first in range(0, len(piece), unit):
                values = piece[first : first + unit]
                moments.add(values)
                yield values


def _check_array(name: str, array: ArraySource) -> None:
    dtype, shape = getattr(array, "dtype", None), getattr(array, "shape", None)
    if dtype is None or shape is None:
        raise ValueError(
            f"{name} is a {type(array).__name__}, whose samples may differ in shape: make one array of it, padded or cut"
        )
    if not isinstance(dtype, np.dtype):
        raise ValueError(f"{name} is a {type(array).__name__} of {dtype}: give a NumPy array, as x.numpy() makes it")
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError(
            f"{name} is a masked array, of which the masked numbers would be stored too: fill them, x.filled(0), or leave out "
            "their samples"
        )
    require_numbers(f"{name} is", dtype, shape)


def _pieces(array: ArraySource) -> Iterator[NDArray[np.int64]]:
    """All indices in runs of some MiB."""
    samples = array.shape[0]
    step = max(1, READ_BYTES // (np.dtype(array.dtype).itemsize * math.prod(array.shape[1:])))
    for start in range(0, samples, step):
        yield np.arange(start, min(start + step, samples))


def _look_at(values: NDArray[Any]) -> tuple[bytes, int, int]:
    """The sha256 of some numbers, and how many are NaN and infinite."""
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    digest = hashlib.sha256(little.view(np.uint8).data).digest()
    if values.dtype.kind != "f":
        return digest, 0, 0
    return digest, int(np.isnan(values).sum()), int(np.isinf(values).sum())
