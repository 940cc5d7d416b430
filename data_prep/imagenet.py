"""ImageNet, or any other tree of image files with one folder per class, as JPEG shards.

The files may be JPEG (baseline or progressive; RGB, grayscale or CMYK) or PNG, whatever their names say. Classes are the
folders in sorted order, as in torchvision's ImageFolder; the source index counts the files class by class, sorted by path.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_prep.folder_tree import Listing, Tree, add_tree_arguments, open_tree
from data_prep.jpeg_files import CONVERSION_QUALITY, JpegFiles
from data_prep.source import JpegSplit, Source
from hvdlocal.communicator import Communicator, succeed_together
from hvdlocal.data.write.jpeg_check import jpeg_versions

SUMMARY = "ImageNet, or any other tree of JPEG and PNG files with a folder per class, as JPEG files"

_ENCODED_BYTES_PER_PIXEL = 0.4  # at quality 90; only the default number of shards depends on it


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    add_tree_arguments(command)


def open_source(arguments: argparse.Namespace, communicator: Communicator) -> Source:
    """Opens the data set; a collective, in which rank 0 alone walks the tree.

    Raises:
        FileNotFoundError, ValueError: as `open_tree`; or an option is out of range, or a library is missing.
    """
    check_encoding(arguments.resize, arguments.quality)
    versions = succeed_together(communicator, jpeg_versions, "data.libraries")
    tree = open_tree(arguments, communicator)
    return jpeg_source("imagenet", tree, arguments.resize, arguments.quality, versions, arguments.bad == "skip")


def check_encoding(resize: int | None, quality: int) -> None:
    """Raises ValueError for options that are out of range."""
    if resize is not None and resize < 8:
        raise ValueError(f"--resize {resize} is too small; it is the short side in pixels, for instance 256")
    if not 1 <= quality <= 100:
        raise ValueError(f"--quality {quality} is out of range; choose 1 to 100, for instance 90")


def jpeg_source(
    data_set: str, tree: Tree, resize: int | None, quality: int, versions: Mapping[str, str], skip_bad: bool
) -> Source:
    """The files of a tree as JPEG files.

    Args:
        data_set: name of the data set, for the manifest.
        tree: the files.
        resize: short side in pixels that larger images are reduced to; None keeps the files.
        quality: JPEG quality of the reduced images.
        versions: of the libraries that decode and encode.
        skip_bad: whether files that cannot be used are left out; otherwise they are refused.
    """
    preparation: dict[str, Any] = {
        "data_set": data_set,
        "conversion_quality": CONVERSION_QUALITY,
        **tree.preparation,
    }
    if resize is not None:
        preparation |= {"resize": resize, "quality": quality}
    return Source(
        {
            name: JpegSplit(
                JpegFiles(tree.root, listing.files, listing.sizes, resize, quality),
                np.array(listing.labels, np.int64),
                tree.classes,
                _size(listing, resize),
                listing.files,
                # What a file is turned into depends on the libraries only where pixels are encoded anew.
                identity(listing, {**preparation, **versions} if resize is not None else preparation),
                skip_bad,
            )
            for name, listing in tree.listings.items()
        },
        preparation,
        tree.remarks,
    )


def _size(listing: Listing, resize: int | None) -> int:
    total = sum(max(size, 0) for size in listing.sizes)
    if resize is None:
        return total
    return min(total, int(len(listing.files) * resize * resize * 4 / 3 * _ENCODED_BYTES_PER_PIXEL))


def identity(listing: Listing, preparation: Mapping[str, Any]) -> str:
    """What identifies the content of a split: names and sizes of its files, and what is done to them."""
    # No times of change: they differ between copies of one tree, and a tree that was touched is not another data set.
    content = json.dumps([listing.files, listing.sizes, preparation], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
