"""CIFAR-100: 50,000 + 10,000 images of 32x32 pixels in 100 classes (https://www.cs.toronto.edu/~kriz/cifar.html).

Reads either of the two layouts of that page, unpacked: the binary version (train.bin, test.bin) or the Python version
(pickles train, test). Every image has a fine label, of 100, and a coarse one, of 20.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.cifar import binary_batch, python_batch
from data_prep.planar import PlanarImages
from data_prep.source import ImageSplit, Source, add_source_argument, open_on_every_rank
from hvdlocal.communicator import Communicator

SUMMARY = "CIFAR-100, 32x32, from its unpacked archive, binary or Python version"

FINE = tuple(
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
    forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
    mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
    sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
    willow_tree wolf woman worm""".split()  # noqa: SIM905
)
COARSE = tuple(
    """aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices household_furniture
    insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes large_omnivores_and_herbivores
    medium_mammals non-insect_invertebrates people reptiles small_mammals trees vehicles_1 vehicles_2""".split()  # noqa: SIM905
)

_SAMPLES = {"train": 50_000, "test": 10_000}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    add_source_argument(command, "directory with train.bin (or train) …")
    command.add_argument(
        "--labels", choices=("fine", "coarse"), default="fine", help="100 classes or 20 (default: %(default)s)"
    )


def open_source(arguments: argparse.Namespace, communicator: Communicator) -> Source:
    """Opens the data set; a collective. Errors: see `load`."""
    return open_on_every_rank(lambda: load(arguments.source, arguments.labels), communicator)


def load(source: Path, labels: str = "fine") -> Source:
    """Opens CIFAR-100 in the directory that holds its files.

    Args:
        source: the directory.
        labels: "fine" or "coarse".

    Raises:
        FileNotFoundError: there is no such directory, or a file is missing.
        ValueError: a file is not what it should be; the message names it.
    """
    splits, classes = {}, FINE if labels == "fine" else COARSE
    for split, samples in _SAMPLES.items():
        if (source / "train.bin").is_file():
            data, chosen = binary_batch(source / f"{split}.bin", samples, 2, 1 if labels == "fine" else 0)
        elif (source / "train").is_file():
            data, chosen = python_batch(source / split, samples, f"{labels}_labels".encode(), "CIFAR-100")
        else:
            raise FileNotFoundError(
                f"{source} holds neither train.bin nor train; unpack cifar-100-binary.tar.gz or "
                "cifar-100-python.tar.gz and name the directory with these files"
            )
        splits[split] = ImageSplit(PlanarImages([data], 32), chosen, classes)
    return Source(splits, {"data_set": "cifar100", "labels": labels})
