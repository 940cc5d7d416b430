"""Small data sets for the tests of the data layer, and the way to the real ones."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hvdlocal.data import ShardedDataset, ShardWriter

CLASSES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture
def source() -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """Makes n images (n, 4, 3, 2) with labels; the first pixel of image i spells i in its two channels, little-endian."""

    def make(n: int) -> tuple[np.ndarray, np.ndarray]:
        i = np.arange(n)
        images = ((i[:, None] * 37 + np.arange(24) * 101) % 251).astype(np.uint8).reshape(n, 4, 3, 2)
        images[:, 0, 0] = np.stack([i % 256, i // 256], axis=1)
        return images, i * 7 % len(CLASSES)

    return make


@pytest.fixture
def make_dataset(tmp_path: Path, source: Callable) -> Callable[..., ShardedDataset]:
    """Writes n images of ``source`` as split "train" under tmp_path and opens them."""

    def make(n: int, num_shards: int = 1, seed: int = 0) -> ShardedDataset:
        ShardWriter(tmp_path, "train", classes=CLASSES, num_shards=num_shards, seed=seed).write(*source(n))
        return ShardedDataset(tmp_path)

    return make


@pytest.fixture(scope="session")
def cifar10_source() -> Path:
    """Directory of the real CIFAR-10, binary version."""
    default = Path(__file__).resolve().parents[4] / "shared" / "data"
    path = Path(os.environ.get("HVDLOCAL_TEST_DATA", default)) / "cifar-10-batches-bin"
    if not path.is_dir():
        pytest.skip(f"no CIFAR-10 at {path}; set HVDLOCAL_TEST_DATA to the directory that holds cifar-10-batches-bin")
    return path
