"""Small data sets that a network learns in seconds."""

from pathlib import Path

import numpy as np

import hvdlocal

TRAIN_IMAGES, TEST_IMAGES = 96, 31


def write_three_classes(directory: Path) -> None:
    """Writes three classes of 8×8 images that differ in which rows are bright: 96 to train on, 31 to test."""
    generator = np.random.default_rng(0)
    for split, count in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)):
        labels = np.arange(count) % 3
        images = generator.integers(0, 60, (count, 8, 8, 1), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 3] += 150
        hvdlocal.ShardWriter(directory, split, classes=["a", "b", "c"]).write(images, labels)
