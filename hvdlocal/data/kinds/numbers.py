"""Which arrays are samples: numbers of a type that torch has, in a fixed shape. Everything else is refused with a remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hvdlocal.data.kinds.arrays import DTYPES

_NUMBER_THEM = "number it, as in names, y = numpy.unique(y, return_inverse=True)"
_NO_NUMBERS = {
    "O": ("arrays of various lengths or objects", "pad or cut all samples to one shape"),
    "S": ("text", _NUMBER_THEM),
    "U": ("text", _NUMBER_THEM),
    "T": ("text", _NUMBER_THEM),
    "V": ("records of several fields", "write each field as an array of its own"),
    "c": ("complex numbers", "write them as two channels, numpy.stack([x.real, x.imag], axis=-1)"),
    "M": ("dates", "write them as integers, x.astype('int64')"),
    "m": ("spans of time", "write them as integers, x.astype('int64')"),
}
"""Types of arrays that are no samples, by NumPy's letter: what they hold, and what to do."""


def require_numbers(subject: str, dtype: np.dtype[Any], shape: tuple[int, ...] | None) -> None:
    """Checks that an array holds samples: numbers in a fixed shape, and at least one of them.

    Args:
        subject: how the message begins: "x is", or "mine.h5 holds x as".
        dtype, shape: of the array; without a shape it holds nothing.

    Raises:
        ValueError: it holds anything else.
    """
    kind = dtype.kind
    special: Mapping[str, Any] = dtype.metadata or {}  # where h5py says what objects are
    if special.get("vlen") in (str, bytes):
        kind = "S"
    if kind in _NO_NUMBERS:
        what, remedy = _NO_NUMBERS[kind]
        if "ref" in special:
            what, remedy = "references", "write the numbers that they refer to"
        raise ValueError(f"{subject} {what}, where samples are numbers in a fixed shape: {remedy}")
    if dtype.name not in DTYPES:
        raise ValueError(f"{subject} {dtype}, which torch has not got: write it as float64")
    if not shape:
        raise ValueError(f"{subject} a single value; the first axis of an array must count the samples")
    if 0 in shape:
        raise ValueError(f"{subject} an array of shape {tuple(shape)}, which is empty; name another array")
