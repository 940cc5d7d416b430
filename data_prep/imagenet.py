"""ImageNet, or any other tree of image files with one folder per class, as JPEG shards.

The files may be JPEG (baseline or progressive; RGB, grayscale or CMYK) or PNG, whatever their names say. Classes are the
folders in sorted order, as in torchvision's ImageFolder; the source index counts the files class by class, sorted by path.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.folder_tree import Listing, list_tree
from data_prep.jpeg_files import CONVERSION_QUALITY, JpegFiles
from data_prep.source import Source, Split
from hvdlocal.data.jpeg_check import jpeg_versions
from hvdlocal.data.team import Team

_ENCODED_BYTES_PER_PIXEL = 0.4  # at quality 90; only the default number of shards depends on it


def load(
    source: Path, splits: Sequence[str] = (), resize: int | None = None, quality: int = 90, team: Team | None = None
) -> Source:
    """List a tree of images; a collective of the team, whose rank 0 alone walks the tree.

    Args:
        source: root of the tree.
        splits: see ``list_tree``.
        resize: short side in pixels that larger images are reduced to; None keeps the files.
        quality: JPEG quality of the reduced images.
        team: ranks that will write the shards.

    Raises:
        FileNotFoundError, ValueError: as ``list_tree``; or an option is out of range, or a library is missing.
    """
    team = team or Team()
    if resize is not None and resize < 8:
        raise ValueError(f"--resize {resize} is too small; it is the short side in pixels, for instance 256")
    if not 1 <= quality <= 100:
        raise ValueError(f"--quality {quality} is out of range; choose 1 to 100, for instance 90")
    versions = team.together(jpeg_versions, "data.libraries")
    classes, listings = team.first(lambda: list_tree(source, splits), "data.list")
    preparation: dict[str, Any] = {"data_set": "imagenet", "conversion_quality": CONVERSION_QUALITY}
    if resize is not None:
        preparation |= {"resize": resize, "quality": quality}
    remarks = []
    for name, listing in listings.items():
        if listing.ignored:
            others = f"{len(listing.ignored)} file{'s' if len(listing.ignored) > 1 else ''}"
            remarks.append(f"{name}: {others} of other kinds ignored, for instance {listing.ignored[0]}")
    return Source(
        classes,
        {
            name: Split(
                JpegFiles(source, listing.files, listing.sizes, resize, quality),
                np.array(listing.labels, np.int64),
                _size(listing, resize),
                listing.files,
                # What a file is turned into depends on the libraries only where pixels are encoded anew.
                _identity(listing, {**preparation, **versions} if resize is not None else preparation),
            )
            for name, listing in listings.items()
        },
        "jpeg",
        preparation,
        remarks,
    )


def _size(listing: Listing, resize: int | None) -> int:
    total = sum(max(size, 0) for size in listing.sizes)
    if resize is None:
        return total
    return min(total, int(len(listing.files) * resize * resize * 4 / 3 * _ENCODED_BYTES_PER_PIXEL))


def _identity(listing: Listing, preparation: dict[str, Any]) -> str:
    # No times of change: they differ between copies of one tree, and a tree that was touched is not another data set.
    content = json.dumps([listing.files, listing.sizes, preparation], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
