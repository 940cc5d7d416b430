"""The kind "arrays": named arrays of numbers, each of one shape and type for all samples, as inputs and targets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.kinds.array_statistics import combine_moments, sound_moments
from hvdlocal.data.kinds.base import (
    Assembly,
    Batch,
    Column,
    Empty,
    Facts,
    Kind,
    Samples,
    Selection,
    is_whole,
    timed,
    units_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from hvdlocal.data.augment import Crop

ROLES = ("input", "target")

DTYPES = (
    "bool",
    *(f"{sign}int{bits}" for bits in (8, 16, 32, 64) for sign in ("", "u")),
    "float16",
    "float32",
    "float64",
)
"""Types of arrays, as in the manifest; stored little-endian."""

_TENSOR_DTYPES = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}
"""Types in a batch, of arrays whose own type has few operations in torch."""

_UNIT_BYTES = 1 << 18  # of all arrays together: small enough to name the damage, large enough to cost next to nothing


def array_facts(
    arrays: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], inputs: Sequence[str], targets: Sequence[str]
) -> dict[str, Any]:
    """The facts of a data set of this kind.

    Args:
        arrays: type, and shape of a sample, of each array by its name.
        inputs, targets: the names by their roles, in the order of the columns.
    """
    described = [
        {"name": name, "role": role, "dtype": np.dtype(arrays[name][0]).name, "shape": tuple(arrays[name][1])}
        for role, names in zip(ROLES, (inputs, targets), strict=True)
        for name in names
    ]
    record_bytes = sum(_sample_bytes(array) for array in described)
    return {"arrays": tuple(described), "samples_per_checksum": max(1, _UNIT_BYTES // record_bytes)}


class Arrays(Kind):
    """Named arrays. A batch is (inputs, targets), each a tensor (n, …) where one array is named, else a dict of them by name.

    Tensors have the type of their array, except that uint16 becomes int32, and uint32 and uint64 become int64.

    The fact `arrays` has, for each, its name, role ("input" or "target"), dtype, and shape of a sample. All arrays of a
    shard have the same units, of `samples_per_checksum` samples. The statistics have, for each array, `mean`, `std`
    (population), `min` and `max` of its finite numbers, and how many are `nan` and `inf`.
    """

    name = "arrays"
    facts = ("arrays", "samples_per_checksum")
    statistics = ("statistics",)
    per_sample = ("index",)

    def sound(self, facts: Facts) -> dict[str, bool]:
        """See `Kind`."""
        arrays, statistics = facts["arrays"], facts["statistics"]
        described = isinstance(arrays, tuple) and all(map(_is_sound, arrays))
        names = [array["name"] for array in arrays] if described else []
        roles = [array["role"] for array in arrays] if described else []
        return {
            "arrays": set(roles) == set(ROLES) and roles == sorted(roles) and not repeated(names),
            "samples_per_checksum": is_whole(facts["samples_per_checksum"], 1),
            "statistics": isinstance(statistics, dict)
            and statistics.keys() == set(names)
            and all(map(sound_moments, statistics.values())),
        }

    def least_bytes(self, facts: Facts) -> int:
        """See `Kind`."""
        return sum(map(_sample_bytes, facts["arrays"]))

    def combine(self, parts: Sequence[Any]) -> dict[str, Any]:
        """See `Kind`; a part has the `Moments` of each array by its name."""
        return {"statistics": {name: combine_moments([part[name] for part in parts]) for name in parts[0]}}

    def tables(self, facts: Facts, samples: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See `Kind`."""
        units = -(-samples // facts["samples_per_checksum"])
        return {"index": ("<i8", (samples,)), "crc32": ("<u4", (len(facts["arrays"]), units))}

    def columns(self, facts: Facts, samples: int, tables: Mapping[str, NDArray[Any]]) -> list[Column]:
        """See `Kind`; one for each array."""
        units = units_of(samples, facts["samples_per_checksum"])
        return [
            Column(f"{array['role']}s/{array['name']}", stored_dtype(array), (samples, *array["shape"]), units)
            for array in facts["arrays"]
        ]

    def take(self, samples: Samples, rows: NDArray[np.int64], out: Any = None) -> dict[str, NDArray[Any]]:
        """All arrays of the samples by their names, (n, …) each, of the types in which they are stored; see `Kind`."""
        taken = {}
        for column, array in enumerate(samples.facts["arrays"]):
            name, dtype, shape = array["name"], stored_dtype(array), (len(rows), *array["shape"])
            values = np.empty(shape, dtype) if out is None else out[name]
            if values.shape != shape or values.dtype != dtype or not values.flags.c_contiguous:
                raise ValueError(
                    f"out[{name!r}] is {values.dtype} {values.shape}; C-contiguous {dtype} {shape} is needed"
                )
            samples.gather(rows, values, column)
            taken[name] = values
        return taken

    def batch(self, samples: Samples, selection: Selection, crop: Crop | None, empty: Empty) -> Assembly:
        """See `Kind`."""
        arrays, rows = samples.facts["arrays"], selection.samples
        tensors = [
            empty((len(rows), *array["shape"]), _TENSOR_DTYPES.get(array["dtype"], array["dtype"])) for array in arrays
        ]

        def read() -> int:
            for column, (array, tensor) in enumerate(zip(arrays, tensors, strict=True)):
                _fill(samples, rows, column, array, tensor)
            return len(rows) * self.least_bytes(samples.facts)

        def finish() -> Batch:
            values: dict[str, dict[str, Tensor]] = {role: {} for role in ROLES}
            for array, tensor in zip(arrays, tensors, strict=True):
                values[array["role"]][array["name"]] = tensor
            inputs, targets = (next(iter(named.values())) if len(named) == 1 else named for named in values.values())
            return inputs, targets

        return Assembly([timed(read)], finish)


def stored_dtype(array: Mapping[str, Any]) -> np.dtype[Any]:
    """The type of an array (an entry of the facts) in a shard."""
    return np.dtype(array["dtype"]).newbyteorder("<")


def repeated(names: Iterable[str]) -> list[str]:
    """Names that cannot be those of datasets in one HDF5 file: equal to one before, or the group of another."""
    known: set[str] = set()
    clashes = []
    for name in sorted(names):
        parts = name.split("/")
        if name in known or any("/".join(parts[:length]) in known for length in range(1, len(parts))):
            clashes.append(name)
        known.add(name)
    return clashes


def is_array_name(name: Any) -> bool:
    """Whether an array can be called that: a name, or several with "/" between them as HDF5 has them."""
    return (
        isinstance(name, str) and re.fullmatch(r"(?!\.{1,2}(/|$))[^/\0]+(/(?!\.{1,2}(/|$))[^/\0]+)*", name) is not None
    )


def _is_sound(array: Any) -> bool:
    return (
        isinstance(array, dict)
        and array.keys() == {"name", "role", "dtype", "shape"}
        and is_array_name(array["name"])
        and array["role"] in ROLES
        and array["dtype"] in DTYPES
        and isinstance(array["shape"], tuple)
        and all(is_whole(side, 1) for side in array["shape"])
    )


def _sample_bytes(array: Mapping[str, Any]) -> int:
    return np.dtype(array["dtype"]).itemsize * math.prod(array["shape"])


def _fill(samples: Samples, rows: NDArray[np.int64], column: int, array: Mapping[str, Any], tensor: Tensor) -> None:
    values = tensor.numpy()
    if values.dtype.itemsize == stored_dtype(array).itemsize:
        samples.gather(rows, values, column)
        if array["dtype"] == "uint64" and values.size and values.min() < 0:
            raise ValueError(
                f"{array['name']} holds numbers from 2**63 on, which no tensor can have: write it as float64"
            )
    else:
        stored = np.empty(values.shape, stored_dtype(array))
        samples.gather(rows, stored, column)
        values[...] = stored
