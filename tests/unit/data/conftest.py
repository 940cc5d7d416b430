"""Small data sets for the tests of the data layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdlocal.data import JpegShardWriter, ShardedDataset, ShardWriter

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

    def make(n: int, num_shards: int = 1, seed: int = 0, **reading: Any) -> ShardedDataset:
        ShardWriter(tmp_path, "train", classes=CLASSES, num_shards=num_shards, seed=seed).write(*source(n))
        return ShardedDataset(tmp_path, **reading)

    return make


@pytest.fixture
def jpeg_files() -> Callable[[int], tuple[list[bytes], np.ndarray]]:
    """Makes n JPEG files of different sizes, every fifth of them grayscale, with labels."""
    simplejpeg = pytest.importorskip("simplejpeg")

    def make(n: int) -> tuple[list[bytes], np.ndarray]:
        files = []
        for i in range(n):
            height, width = 16 + i % 7, 24 - i % 5
            ramp = np.arange(height * width * 3, dtype=np.uint32).reshape(height, width, 3)
            pixels = (ramp * (i + 1) // 7 % 256).astype(np.uint8)
            if i % 5 == 4:
                files.append(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[..., :1]), 90, "GRAY", "Gray"))
            else:
                files.append(simplejpeg.encode_jpeg(pixels, 90, "RGB", "420"))
        return files, np.arange(n) * 7 % len(CLASSES)

    return make


@pytest.fixture
def make_jpeg_dataset(tmp_path: Path, jpeg_files: Callable) -> Callable[..., ShardedDataset]:
    """Writes n files of ``jpeg_files`` as split "train" under tmp_path and opens them."""

    def make(n: int, num_shards: int = 1, seed: int = 0) -> ShardedDataset:
        JpegShardWriter(tmp_path, "train", classes=CLASSES, num_shards=num_shards, seed=seed).write(*jpeg_files(n))
        return ShardedDataset(tmp_path)

    return make
