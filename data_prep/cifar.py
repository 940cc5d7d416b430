"""What CIFAR-10 and CIFAR-100 have in common: batches of 32x32 images in a binary and a Python version."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.pickles import load_arrays

PIXELS = 3 * 32 * 32  # per image, one colour plane after the other

Batch = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def binary_batch(path: Path, samples: int, label_bytes: int, which: int) -> Batch:
    """Pixels (samples, 3072) and labels (samples,) of a batch of the binary version, both uint8.

    Args:
        path: the file; mapped, not read.
        samples: how many it must hold.
        label_bytes: labels before the pixels of each image.
        which: the label that counts.

    Raises:
        FileNotFoundError: the batch is missing.
        ValueError: it has another size.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; unpack the whole archive")
    size, due = path.stat().st_size, samples * (label_bytes + PIXELS)
    if size != due:
        raise ValueError(f"{path} has {size} bytes where {due} are due; download it again")
    records = np.memmap(path, np.uint8, "r", 0, (samples, label_bytes + PIXELS))
    return records[:, label_bytes:], np.array(records[:, which])


def python_batch(path: Path, samples: int, key: bytes, data_set: str) -> Batch:
    """As `binary_batch`, of the Python version; `key` names the labels. No code in the pickle is run."""
    try:
        batch = load_arrays(path)
        data, labels = batch[b"data"], np.array(batch[key], np.uint8)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the pickle holds instead of a batch
        raise ValueError(
            f"{path} is not a batch of {data_set}'s Python version ({error}); download it again"
        ) from error
    if not isinstance(data, np.ndarray) or (data.dtype, data.shape, labels.shape) != (
        np.uint8,
        (samples, PIXELS),
        (samples,),
    ):
        raise ValueError(
            f"{path} does not hold uint8 ({samples}, {PIXELS}) data with as many labels; download it again"
        )
    return data, labels
