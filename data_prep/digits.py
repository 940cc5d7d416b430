"""scikit-learn's handwritten digits: 1,797 images of 8x8 pixels in ten classes, bundled with scikit-learn.

The set has no official split. The test split is every sixth image of each class (in the order of the source): 296
images, 29 or 30 of each class, against 1,501 for training. Writers contribute to both, as the set does not say who
wrote what.
"""

from __future__ import annotations

import argparse

import numpy as np

from data_prep.source import ImageSplit, Source, open_on_every_rank
from hvdlocal.communicator import Communicator

SUMMARY = "scikit-learn's handwritten digits, 8x8"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """There are none."""


def open_source(arguments: argparse.Namespace, communicator: Communicator) -> Source:
    """Opens the data set; a collective. Errors: see `load`."""
    return open_on_every_rank(load, communicator)


def load() -> Source:
    """The digits as uint8: the original values 0..16 times 255/16, rounded.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ValueError(
            "the digits come with scikit-learn, which is not installed; pip install 'hvdlocal[digits]'"
        ) from error
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    test = np.zeros(len(images), bool)
    for digit in range(10):
        test[np.flatnonzero(digits.target == digit)[5::6]] = True
    classes = tuple(str(digit) for digit in range(10))
    splits = {
        "train": ImageSplit(images[~test], digits.target[~test], classes),
        "test": ImageSplit(images[test], digits.target[test], classes),
    }
    return Source(splits, {"data_set": "digits"})
