"""CIFAR-10: 50,000 + 10,000 images of 32x32 pixels in ten classes (https://www.cs.toronto.edu/~kriz/cifar.html).

Reads either of the two layouts of that page, unpacked: the binary version (data_batch_1.bin … test_batch.bin) or the
Python version (pickles data_batch_1 … test_batch). The source index counts through the batches in this order.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from data_prep.cifar import Batch, binary_batch, python_batch
from data_prep.planar import PlanarImages
from data_prep.pooling import PooledImages
from data_prep.source import ImageSplit, Source, add_source_argument, open_on_every_rank
from hvdlocal.communicator import Communicator

SUMMARY = "CIFAR-10, 32x32, from its unpacked archive, binary or Python version"

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_SAMPLES = 10_000  # per batch


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    add_source_argument(command, "directory with data_batch_1.bin (or data_batch_1) …")
    command.add_argument(
        "--pool", type=int, default=1, metavar="P", help="make each square of P x P pixels one, their mean"
    )
    command.add_argument(
        "--limit", type=int, metavar="N", help="take only the first N training images (their order is random)"
    )


def open_source(arguments: argparse.Namespace, communicator: Communicator) -> Source:
    """Opens the data set; a collective. Errors: see `load`."""
    return open_on_every_rank(lambda: load(arguments.source, arguments.pool, arguments.limit), communicator)


def load(source: Path, pool: int = 1, limit: int | None = None) -> Source:
    """Opens CIFAR-10 in the directory that holds its batches.

    Args:
        source: the directory.
        pool: side of the squares of pixels that become one, by their mean.
        limit: how many training images to take, the first in the order of the batches, which is random; None for all.

    Raises:
        FileNotFoundError: there is no such directory, or a batch is missing.
        ValueError: a batch is not what it should be; the message names it.
    """
    if (source / "data_batch_1.bin").is_file():
        suffix, read = ".bin", read_binary_batch
    elif (source / "data_batch_1").is_file():
        suffix, read = "", read_python_batch
    else:
        raise FileNotFoundError(
            f"{source} holds neither data_batch_1.bin nor data_batch_1; unpack cifar-10-binary.tar.gz or "
            "cifar-10-python.tar.gz and name the directory with the batches"
        )
    most = len(_BATCHES["train"]) * _SAMPLES
    if limit is not None and not 0 < limit <= most:
        raise ValueError(f"--limit {limit}: from 1 to {most} training images")
    splits = {}
    for split, names in _BATCHES.items():
        left = limit if limit is not None and split == "train" else most
        parts, labels = [], []
        for name in names[: -(-left // _SAMPLES)]:
            pixels, numbers = read(source / (name + suffix))
            parts.append(pixels[:left])
            labels.append(numbers[:left])
            left -= len(parts[-1])
        images = PlanarImages(parts, 32)
        splits[split] = ImageSplit(images if pool == 1 else PooledImages(images, pool), np.concatenate(labels), CLASSES)
    changes = {"pool": pool} if pool != 1 else {}
    changes |= {"limit": limit} if limit is not None else {}
    return Source(splits, {"data_set": "cifar10", **changes})


def read_binary_batch(path: Path) -> Batch:
    """Pixels (10000, 3072) and labels (10000,) of a batch of the binary version, both uint8."""
    return binary_batch(path, _SAMPLES, 1, 0)


def read_python_batch(path: Path) -> Batch:
    """Pixels (10000, 3072) and labels (10000,) of a batch of the Python version, both uint8. No code in the pickle is
    run.
    """
    return python_batch(path, _SAMPLES, b"labels", "CIFAR-10")
