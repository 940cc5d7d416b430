"""Labels as people write them, as numbers of classes."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def class_numbers(labels: NDArray[Any], count: int, things: str = "images") -> NDArray[np.integer]:
    """The number of the class of each sample.

    Args:
        labels: integers (count,) or (count, 1), or one-hot rows (count, classes): one 1 in each, and zeros.
        count: number of samples.
        things: what the samples are, for the message.

    Returns:
        Integers (count,); whether they are in the range of the classes is not looked at.

    Raises:
        ValueError: the labels are anything else; the message says how to make numbers of them, but not whose labels they are.
    """
    if labels.dtype.kind in "iu" and labels.shape in ((count,), (count, 1)):
        return labels.reshape(count)
    rows = labels.ndim == 2 and len(labels) == count and labels.shape[1] > 1 and labels.dtype.kind in "iufb"
    if rows and np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all():
        return labels.argmax(axis=1)
    raise ValueError(no_class_numbers(labels.dtype, labels.shape, count, things))


def labels_sha256(labels: NDArray[np.integer]) -> str:
    """Hex sha256 of labels as little-endian int32."""
    return hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest()


def no_class_numbers(dtype: np.dtype[Any], shape: tuple[int, ...] | None, count: int, things: str = "images") -> str:
    """Why labels of this type and shape cannot be used, and what to do: "int64 (9,); integers, one …"."""
    found = f"{dtype} {shape}; integers, one for each of the {count} {things}, shape ({count},), are needed"
    if not shape or shape[0] != count:
        return found
    if dtype.kind in "OSUTV":
        return f"{found}: number the classes, as in names, labels = numpy.unique(labels, return_inverse=True)"
    if len(shape) == 1:
        return f"{found}: convert them, as in labels.astype(int)"
    if len(shape) > 2:
        return found
    return f"{found}: of one-hot rows, labels.argmax(axis=1) makes them, and these are not one-hot"
