"""Images made of numbers alone: a coarse pattern per class under noise. For trying things out where no data are at hand.

Equal arguments give equal pixels everywhere. A small network learns the classes in seconds; nothing else is in them.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.source import ImageSplit, JpegSplit, Source, Split, open_on_every_rank
from hvdlocal.communicator import Communicator
from hvdlocal.data import JpegSample
from hvdlocal.data.write.jpeg_check import jpeg_libraries, jpeg_versions

SUMMARY = "images made of numbers: a pattern per class under noise, for trying things out"

_GRID = 4  # the pattern has this many cells per side
_PATTERNS, _NOISE, _SIZES = 0, 1, 2
_QUALITY = 90


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    command.add_argument(
        "--samples", type=int, default=10_000, help="to train on (default: %(default)s); a fifth to test"
    )
    command.add_argument("--classes", type=int, default=10, help="number of classes (default: %(default)s)")
    command.add_argument("--size", type=int, default=32, help="height and width in pixels (default: %(default)s)")
    command.add_argument(
        "--jpeg", action="store_true", help="write JPEG files of different sizes instead of raw pixels"
    )


def open_source(arguments: argparse.Namespace, communicator: Communicator) -> Source:
    """Opens the data set; a collective. Errors: see `load`."""
    given = (arguments.samples, arguments.classes, arguments.size, arguments.seed, arguments.jpeg)
    return open_on_every_rank(lambda: load(*given), communicator)


def load(samples: int, classes: int, size: int, seed: int, jpeg: bool = False) -> Source:
    """A train split of `samples` images and a test split of a fifth as many.

    Args:
        samples: number of images to train on.
        classes: number of classes; sample i is of class i modulo this.
        size: height and width in pixels; with `jpeg` the shorter, the other being up to half as long again.
        seed: of the patterns and the noise.
        jpeg: encode the images as JPEG files.

    Raises:
        ValueError: a number is out of range.
    """
    if classes < 1 or samples < classes:
        raise ValueError(f"--samples {samples} --classes {classes}: there must be at least one sample of each class")
    if not _GRID <= size <= 4096:
        raise ValueError(f"--size {size} is out of range; choose {_GRID} to 4096 pixels")
    names = tuple(f"class{number:0{len(str(classes - 1))}d}" for number in range(classes))
    facts: dict[str, Any] = {"data_set": "synthetic", "samples": samples, "size": size, "seed": seed}
    splits: dict[str, Split] = {}
    for split, (first, count) in {"train": (0, samples), "test": (samples, max(classes, samples // 5))}.items():
        labels = np.arange(first, first + count) % classes
        identity = f"synthetic 1, {split}, {facts}, {classes} classes"
        images = SyntheticImages(first, count, classes, size, seed)
        if jpeg:
            identity += f", {jpeg_versions()}"
            splits[split] = JpegSplit(
                SyntheticFiles(images), labels, names, count * size * size // 2, identity=identity
            )
        else:
            splits[split] = ImageSplit(images, labels, names, identity)
    return Source(splits, facts)


class SyntheticImages:
    """Images (count, size, size, 3) of uint8, made when they are asked for.

    Args:
        first: number of the first; the noise of an image depends on its number.
        count, classes, size, seed: see `load`.
    """

    def __init__(self, first: int, count: int, classes: int, size: int, seed: int) -> None:
        self.shape = (count, size, size, 3)
        self.dtype = np.dtype(np.uint8)
        self._first, self._classes, self._seed = first, classes, seed

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images with the given indices: uint8 (n, size, size, 3)."""
        side = self.shape[1]
        return np.stack([self.draw(int(row), side, side) for row in rows])

    def draw(self, row: int, height: int, width: int) -> NDArray[np.uint8]:
        """Image `row`, stretched to the given size: uint8 (height, width, 3)."""
        number = self._first + row
        cells = self._bytes(_PATTERNS, number % self._classes, _GRID * _GRID * 3).reshape(_GRID, _GRID, 3)
        pattern = cells[np.arange(height) * _GRID // height][:, np.arange(width) * _GRID // width]
        noise = self._bytes(_NOISE, number, height * width * 3).reshape(height, width, 3)
        return (pattern // 2 + noise // 2).astype(np.uint8)

    def dims(self, row: int) -> tuple[int, int]:
        """Height and width of image `row` as a JPEG file."""
        size = self.shape[1]
        extra, across = (int(value) for value in self._bytes(_SIZES, self._first + row, 2))
        longer = size + extra * (size // 2) // 255
        return (size, longer) if across % 2 else (longer, size)

    def _bytes(self, purpose: int, number: int, count: int) -> NDArray[np.uint8]:
        # The raw stream of a bit generator never changes, which NumPy does not promise of its distributions.
        raw = np.random.Philox(key=np.array([self._seed, number << 8 | purpose], np.uint64)).random_raw(-(-count // 8))
        return raw.astype("<u8").view(np.uint8)[:count]


class SyntheticFiles:
    """The same as JPEG files of different sizes, for `JpegShardWriter`."""

    def __init__(self, images: SyntheticImages) -> None:
        self._images = images

    def __len__(self) -> int:
        return self._images.shape[0]

    def __getitem__(self, index: int) -> JpegSample:
        """File `index`."""
        pixels = self._images.draw(index, *self._images.dims(index))
        return JpegSample(jpeg_libraries()[0].encode_jpeg(pixels, _QUALITY, "RGB", "420"))
