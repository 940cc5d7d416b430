"""Images and labels in one HDF5 file that somebody else wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.format.labels import class_numbers, no_class_numbers
from hvdlocal.data.read.hdf5_inspection import Found, Inspection, inspect, type_of

ChannelAxis = Literal["auto", "first", "last"]
CHANNEL_AXES = ("auto", "first", "last")

_MOST_USUAL_CHANNELS = 4


@dataclass(frozen=True)
class ForeignFile:
    """What was found in one file.

    Attributes:
        images: where the images lie.
        shape: (height, width, channels) of each.
        labels: int32 (n,).
        sources: all other files that images or labels come from, each as `Found.holder`.
    """

    images: Found
    shape: tuple[int, int, int]
    labels: NDArray[np.int32]
    sources: tuple[str, ...] = ()


def inspect_file(path: Path, images: str, labels: str, channels: ChannelAxis) -> ForeignFile:
    """Finds out where images and labels lie, and reads the labels.

    Args:
        path: the file.
        images, labels: names of data sets in it.
        channels: which axis of four holds the channels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be used; the message names it and mostly the remedy.
    """

    def look(file: Inspection) -> ForeignFile:
        dataset = file.dataset(images)
        if dataset.dtype != np.uint8 or dataset.shape is None or dataset.ndim not in (3, 4) or 0 in dataset.shape:
            raise ValueError(
                f"{path} holds /{images} as {type_of(dataset)} {dataset.shape}; uint8 (N, H, W, C) or (N, H, W) with at "
                "least one image is needed: convert it, or name another dataset"
            )
        shape, channels_first = _image_shape(path, dataset, images, channels)
        found = file.find(dataset, images, channels_first)
        numbers = _labels(file, file.dataset(labels), len(dataset))
        return ForeignFile(found, shape, numbers, file.sources)

    return inspect(path, look, "images and labels")


def _image_shape(
    path: Path, images: h5py.Dataset, name: str, channels: ChannelAxis
) -> tuple[tuple[int, int, int], bool]:
    """(height, width, channels), and whether the file has the channels first."""
    if images.ndim == 3:
        return (*images.shape[1:], 1), False
    _, second, third, last = images.shape
    if channels == "auto" and last < second:
        channels = "last"
    elif channels == "auto" and second <= _MOST_USUAL_CHANNELS < last:
        channels = "first"
    if channels == "auto":
        raise ValueError(
            f"{path} holds /{name} of shape {images.shape}, which does not tell whether the channels are the second "
            "axis or the last: say channels='first' or channels='last'"
        )
    if channels == "last":
        return (second, third, last), False
    return (third, last, second), second > 1  # one channel lies in the file as if it were last


def _labels(file: Inspection, dataset: h5py.Dataset, count: int) -> NDArray[np.int32]:
    where = file.where(dataset)
    if dataset.shape is None or dataset.shape[:1] != (count,) or dataset.ndim > 2 or dataset.dtype.kind not in "iufb":
        why = no_class_numbers(dataset.dtype, dataset.shape, count)
        raise ValueError(f"{where} holds {dataset.name} as {why}")
    file.require_written(dataset)
    try:
        labels = class_numbers(np.asarray(dataset[:]), count)
    except ValueError as error:
        raise ValueError(f"{where} holds {dataset.name} as {error}") from None
    if labels.min() < 0 or labels.max() >= 2**31:
        raise ValueError(
            f"{where} holds labels {labels.min()}..{labels.max()} in {dataset.name}; number the classes from 0"
        )
    return labels.astype(np.int32)
