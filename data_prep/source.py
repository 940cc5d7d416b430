"""What a data set's module hands to the writers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdlocal.communicator import Communicator, succeed_together
from hvdlocal.data import ImageSource, JpegSource


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        samples: equally sized images, or JPEG files.
        labels: integers (N,).
        size: bytes that the samples will take, or a fair guess; decides the number of shards.
        names: what messages call the samples; only for JPEG files.
        identity: see `ShardWriter.write`.
    """

    samples: ImageSource | JpegSource
    labels: NDArray[np.integer]
    size: int
    names: Sequence[str] | None = None
    identity: str | None = None


@dataclass(frozen=True)
class Source:
    """A data set, read as it is written.

    Attributes:
        classes: class names; label i means classes[i].
        splits: by name.
        kind: of all splits, as in the manifest.
        preparation: facts that the manifests shall record.
        remarks: sentences for the user.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    kind: str = "images"
    preparation: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()


def image_split(images: ImageSource, labels: NDArray[np.integer], identity: str | None = None) -> Split:
    """A split of equally sized images."""
    return Split(images, labels, int(np.prod(images.shape)), identity=identity)


def open_on_every_rank(load: Callable[[], Source], communicator: Communicator) -> Source:
    """The source, which every rank opens for itself; a collective. If one cannot, none goes on."""
    return succeed_together(communicator, load, "data.source")


def add_source_argument(command: argparse.ArgumentParser, what: str) -> None:
    """Adds `--source DIR`."""
    command.add_argument("--source", type=Path, required=True, metavar="DIR", help=what)
