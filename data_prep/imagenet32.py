"""ImageNet at 64x64, 32x32, 16x16 or 8x8 pixels (Chrabaszcz et al. 2017, arXiv:1707.08819; https://image-net.org).

Reads the unpacked pickles train_data_batch_1 … train_data_batch_10 and val_data: `data` uint8 (n, 3·S·S), one colour plane
after the other, and `labels` 1..1000 in the order of map_clsloc.txt, which is not the sorted order of the WordNet ids. The
labels are stored as 0..999 in the same order. The classes are named by the WordNet ids of map_clsloc.txt when it lies
beside the pickles, else "1" … "1000".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.pickles import load_arrays
from data_prep.planar import PlanarImages
from data_prep.source import ImageSplit, Source, add_source_argument, open_on_every_rank
from hvdlocal.communicator import Communicator

SUMMARY = "downsampled ImageNet (also 8x8, 16x16 and 64x64), from its unpacked pickles"

_BATCHES = {"train": [f"train_data_batch_{number}" for number in range(1, 11)], "val": ["val_data"]}
_CLASSES = 1000
_SIDES = {3 * side * side: side for side in (8, 16, 32, 64)}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    add_source_argument(command, "directory with train_data_batch_1 …, val_data and, for class names, map_clsloc.txt")


def open_source(arguments: argparse.Namespace, communicator: Communicator) -> Source:
    """Opens the data set; a collective. Errors: see `load`."""
    return open_on_every_rank(lambda: load(arguments.source), communicator)


def load(source: Path) -> Source:
    """Opens downsampled ImageNet in the directory that holds its pickles. The pixels stay in the files.

    Raises:
        FileNotFoundError: there is no such directory, or a file is missing.
        ValueError: a file is not what it should be; the message names it.
    """
    if not (source / "train_data_batch_1").is_file():
        raise FileNotFoundError(
            f"{source} does not hold train_data_batch_1; unpack Imagenet32_train.zip and Imagenet32_val.zip into one "
            "directory and name it"
        )
    classes = _class_names(source / "map_clsloc.txt")
    splits, sides = {}, set()
    for split, names in _BATCHES.items():
        parts, labels = zip(*(read_batch(source / name) for name in names), strict=True)
        sides |= {part.shape[1] for part in parts}
        if len(sides) > 1:
            raise ValueError(
                f"{source} mixes images of {sorted(_SIDES[width] for width in sides)} pixels; keep one size"
            )
        splits[split] = ImageSplit(PlanarImages(parts, _SIDES[parts[0].shape[1]]), np.concatenate(labels), classes)
    return Source(splits, {"data_set": "imagenet32"})


def read_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels, uint8 (n, 3·S·S), and labels 0..999, int64 (n,). No code in the pickle is run."""
    try:
        batch = load_arrays(path)
        data, labels = (
            batch[b"data" if b"data" in batch else "data"],
            batch[b"labels" if b"labels" in batch else "labels"],
        )
        labels = np.array(labels, np.int64)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the pickle holds instead of a batch
        raise ValueError(f"{path} is not a batch of downsampled ImageNet ({error}); download it again") from error
    fits = isinstance(data, np.ndarray) and data.ndim == 2 and data.dtype == np.uint8 and data.shape[1] in _SIDES
    if not fits or labels.shape != (len(data),) or not len(data):
        raise ValueError(
            f"{path} does not hold uint8 (n, 3·S·S) data, S being 8, 16, 32 or 64, with n labels; download it again"
        )
    if labels.min() < 1 or labels.max() > _CLASSES:
        raise ValueError(f"{path} holds labels {labels.min()}..{labels.max()} where 1..{_CLASSES} are due")
    return data, labels - 1


def _class_names(path: Path) -> tuple[str, ...]:
    """The class names from lines such as `n02119789 1 kit_fox`."""
    if not path.is_file():
        return tuple(str(label) for label in range(1, _CLASSES + 1))
    names: dict[int, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        fields = line.split()
        if len(fields) < 2 or not fields[1].isdecimal():
            raise ValueError(f"line {number} of {path} is {line!r}; 'n02119789 1 kit_fox' is the form")
        names[int(fields[1])] = fields[0]
    if sorted(names) != list(range(1, _CLASSES + 1)):
        raise ValueError(f"{path} names {len(names)} labels where 1..{_CLASSES} are due")
    return tuple(names[label] for label in range(1, _CLASSES + 1))
