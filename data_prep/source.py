"""What a data set's module hands to the writers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hvdlocal.communicator import Communicator, succeed_together
from hvdlocal.data import ImageSource, JpegShardWriter, JpegSource, ShardWriter
from hvdlocal.data.format.manifest import Manifest


class Split(Protocol):
    """One split of a data set."""

    @property
    def num_samples(self) -> int:
        """How many samples are written."""

    @property
    def size(self) -> int:
        """Bytes that the samples will take, or a fair guess; decides the number of shards."""

    def write(
        self, directory: Path, split: str, preparation: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Manifest:
        """Writes the split; a collective.

        Args:
            directory: of the data set.
            split: name of the split.
            preparation: facts that the manifest shall record.
            options: arguments that all writers have, by name: see `SplitWriter`.
        """


@dataclass(frozen=True)
class ImageSplit:
    """Equally sized images.

    Attributes:
        samples: the images.
        labels: integers (N,).
        classes: class names; label i means classes[i].
        identity: see `ShardWriter.write`.
    """

    samples: ImageSource
    labels: NDArray[np.integer]
    classes: Sequence[str]
    identity: str | None = None

    @property
    def num_samples(self) -> int:
        """See `Split`."""
        return len(self.labels)

    @property
    def size(self) -> int:
        """See `Split`."""
        return int(np.prod(self.samples.shape))

    def write(
        self, directory: Path, split: str, preparation: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Manifest:
        """See `Split`."""
        writer = ShardWriter(directory, split, classes=self.classes, **options)
        return writer.write(self.samples, self.labels, identity=self.identity, preparation=preparation)


@dataclass(frozen=True)
class JpegSplit:
    """JPEG files.

    Attributes:
        samples, labels, classes, identity: as for images.
        size: as for any split.
        names: what messages call the samples.
        skip_bad: whether files that cannot be used are left out; otherwise they are refused.
    """

    samples: JpegSource
    labels: NDArray[np.integer]
    classes: Sequence[str]
    size: int
    names: Sequence[str] | None = None
    identity: str | None = None
    skip_bad: bool = False

    @property
    def num_samples(self) -> int:
        """See `Split`."""
        return len(self.labels)

    def write(
        self, directory: Path, split: str, preparation: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Manifest:
        """See `Split`."""
        writer = JpegShardWriter(directory, split, classes=self.classes, skip_bad=self.skip_bad, **options)
        return writer.write(
            self.samples, self.labels, names=self.names, identity=self.identity, preparation=preparation
        )


@dataclass(frozen=True)
class Source:
    """A data set, read as it is written.

    Attributes:
        splits: by name.
        preparation: facts that the manifests shall record.
        remarks: sentences for the user.
        close: called when all splits are written, or cannot be.
    """

    splits: Mapping[str, Split]
    preparation: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    close: Callable[[], None] = lambda: None


def open_on_every_rank(load: Callable[[], Source], communicator: Communicator) -> Source:
    """The source, which every rank opens for itself; a collective. If one cannot, none goes on."""
    return succeed_together(communicator, load, "data.source")


def add_source_argument(command: argparse.ArgumentParser, what: str) -> None:
    """Adds `--source DIR`."""
    command.add_argument("--source", type=Path, required=True, metavar="DIR", help=what)
