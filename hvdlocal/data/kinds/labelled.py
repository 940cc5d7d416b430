"""What kinds of images have in common: a class label for each, and the mean and standard deviation of all pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.kinds.base import Empty, Facts, Kind, Samples, is_share
from hvdlocal.data.kinds.pixel_statistics import mean_and_std

if TYPE_CHECKING:
    from torch import Tensor


class LabelledImages(Kind):
    """Images with labels.

    The facts are `shape`, (height, width, channels) of every image or None, and `classes`, the names of the classes.
    The statistics are `mean` and `std` per channel, of the pixel values divided by 255.
    """

    facts = ("shape", "classes")
    statistics = ("mean", "std")
    per_sample: ClassVar[tuple[str, ...]] = ("labels", "index")
    named_in_fingerprint = False  # it follows from `shape`

    def sound(self, facts: Facts) -> dict[str, bool]:
        """See `Kind`."""
        classes, mean, std = facts["classes"], facts["mean"], facts["std"]
        channels = (facts["shape"] or (3,))[-1]
        return {
            "classes": isinstance(classes, tuple)
            and len(classes) > 0
            and all(isinstance(name, str) for name in classes),
            "mean": len(mean) == channels and all(map(is_share, mean)),
            "std": len(std) == channels and all(map(is_share, std)),
        }

    def combine(self, parts: Sequence[Any]) -> dict[str, Any]:
        """See `Kind`; a part is a histogram, (channels, 256)."""
        mean, std = mean_and_std(np.sum(parts, axis=0))
        return {"mean": mean, "std": std}

    def sealed(self, facts: Facts) -> dict[str, Any]:
        """See `Kind`."""
        return {"classes_sha256": facts["classes"]}

    def check_tables(self, facts: Facts, tables: Mapping[str, NDArray[Any]]) -> None:
        """See `Kind`."""
        labels, classes = tables["labels"], len(facts["classes"])
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"labels {labels.min()}..{labels.max()} but names {classes} classes")


def labels_of(samples: Samples, rows: NDArray[np.int64], empty: Empty) -> Tensor:
    """The labels of some samples, int64 (n,)."""
    labels = empty((len(rows),), np.int64)
    labels.numpy()[:] = samples.tables["labels"][rows]
    return labels
