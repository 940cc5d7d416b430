"""CIFAR-10: 50,000 + 10,000 images of 32x32 pixels in ten classes (https://www.cs.toronto.edu/~kriz/cifar.html).

Reads either of the two layouts of that page, unpacked: the binary version (data_batch_1.bin … test_batch.bin) or the
Python version (pickles data_batch_1 … test_batch). The source index counts through the batches in this order.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.source import Source

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_SAMPLES, _PIXELS = 10_000, 3 * 32 * 32  # per batch; per image, one colour plane after the other

_Batch = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def load(source: Path) -> Source:
    """Read CIFAR-10 from the directory that holds its batches.

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
    splits = {}
    for split, names in _BATCHES.items():
        planes, labels = zip(*(read(source / (name + suffix)) for name in names), strict=True)
        images = np.concatenate(planes).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        splits[split] = (images, np.concatenate(labels))
    return Source(CLASSES, splits)


def read_binary_batch(path: Path) -> _Batch:
    """Pixels (10000, 3072) and labels (10000,) of a batch of the binary version, both uint8."""
    content = np.frombuffer(_bytes_of(path), np.uint8)
    if content.size != _SAMPLES * (1 + _PIXELS):
        raise ValueError(f"{path} has {content.size} bytes where {_SAMPLES * (1 + _PIXELS)} are due; download it again")
    records = content.reshape(_SAMPLES, 1 + _PIXELS)
    return records[:, 1:], records[:, 0]


def read_python_batch(path: Path) -> _Batch:
    """Pixels (10000, 3072) and labels (10000,) of a batch of the Python version, both uint8. No code in the pickle is
    run.
    """
    try:
        batch = _ArrayUnpickler(io.BytesIO(_bytes_of(path)), encoding="bytes").load()
        data, labels = batch[b"data"], np.array(batch[b"labels"], np.uint8)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path} is not a batch of CIFAR-10's Python version ({error}); download it again") from error
    if not isinstance(data, np.ndarray) or (data.dtype, data.shape, labels.shape) != (
        np.uint8,
        (_SAMPLES, _PIXELS),
        (_SAMPLES,),
    ):
        raise ValueError(
            f"{path} does not hold uint8 ({_SAMPLES}, {_PIXELS}) data with as many labels; download it again"
        )
    return data, labels


def _bytes_of(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; unpack the whole archive")
    return path.read_bytes()


class _ArrayUnpickler(pickle.Unpickler):
    """Builds plain containers, strings, numbers and NumPy arrays, and refuses everything else: a pickle can name any
    function.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) == ("numpy.core.multiarray", "_reconstruct"):
            return _new_array
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 spells bytes in the old protocol
            return _latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")


def _new_array(subtype: type, shape: tuple[int, ...], kind: bytes) -> np.ndarray:
    return np.ndarray((0,), np.uint8)  # as NumPy's pickles begin; the array's own state follows


def _latin1(text: str, encoding: str | bytes) -> bytes:
    return text.encode("latin1")
