"""What the writers of images with labels have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvdlocal.data.format.labels import class_numbers, labels_sha256
from hvdlocal.data.format.manifest import Manifest
from hvdlocal.data.write.split_writer import SplitWriter


class LabelledWriter(SplitWriter):
    """The part of a writer of images that is about their labels.

    Args:
        directory: where the data set lives; created if need be.
        split: name of the split, e.g. "train".
        classes: class names; label i means classes[i].
        options: the other arguments of `SplitWriter`.
    """

    def __init__(self, directory: str | Path, split: str, *, classes: Sequence[str], **options: Any) -> None:
        if not classes or isinstance(classes, str) or len(set(classes)) != len(classes):
            raise ValueError(f"classes {classes!r} must be a list of at least one name, each of them once")
        super().__init__(directory, split, **options)
        self.classes = tuple(classes)

    def _check_labels(self, labels: ArrayLike, n: int, things: str) -> NDArray[np.int32]:
        self._require_samples(n, things)
        try:
            array = class_numbers(np.asarray(labels), n, things)
        except ValueError as error:
            raise ValueError(f"labels are {error}") from None
        out_of_range = np.flatnonzero((array < 0) | (array >= len(self.classes)))
        if len(out_of_range):
            first = int(out_of_range[0])
            raise ValueError(
                f"label {array[first]} of sample {first} is out of range; "
                f"{len(self.classes)} classes take labels 0..{len(self.classes) - 1}"
            )
        return array.astype(np.int32)

    def _labelled_draft(
        self, kind: str, shape: tuple[int, int, int] | None, labels: NDArray[np.int32], identity: str
    ) -> Manifest:
        source = {"labels": labels_sha256(labels), "source": identity}
        return self._draft(kind, {"shape": shape, "classes": self.classes}, source)
