"""Which arrays a user named, in which files, and where they lie: all files together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvdlocal.communicator.agreement import require_agreement, succeed_together
from hvdlocal.communicator.base import Communicator
from hvdlocal.data.format.extent import Unmappable
from hvdlocal.data.read.foreign_extents import Contiguous, Found
from hvdlocal.data.read.hdf5_inspection import Named, holder_of, refuse_twice
from hvdlocal.data.read.opening import open_each
from hvdlocal.data.read.storage import Layout
from hvdlocal.data.read.user_arrays_file import ForeignArrays, inspect_arrays


@dataclass(frozen=True)
class NamedArrays:
    """What the user named.

    Attributes:
        paths: the files.
        inputs, targets: names of the arrays.
    """

    paths: tuple[Path, ...]
    inputs: tuple[str, ...]
    targets: tuple[str, ...]

    @classmethod
    def of(cls, paths: str | Path | Sequence[str | Path], inputs: str, targets: str) -> NamedArrays:
        """The source of one path or several, and of names that are separated by commas."""
        several = (paths,) if isinstance(paths, str | Path) else paths
        return cls(tuple(map(Path, several)), _names(inputs), _names(targets))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all arrays."""
        return self.inputs + self.targets

    def check(self) -> None:
        """Raises ValueError if a name is missing, or comes twice."""
        if not self.paths:
            raise ValueError("no file was named; give at least one path")
        if not self.inputs or not self.targets or not all(self.names):
            raise ValueError(
                f"inputs are {', '.join(self.inputs) or 'missing'} and targets {', '.join(self.targets) or 'missing'}; name at "
                "least one array of each"
            )
        for name in self.names:
            if self.names.count(name) > 1:
                raise ValueError(
                    f"{name} is named {self.names.count(name)} times in inputs {', '.join(self.inputs)} and targets "
                    f"{', '.join(self.targets)}; name every array once"
                )


def find_arrays(source: NamedArrays, communicator: Communicator) -> list[ForeignArrays]:
    """Looks for the arrays in every file; a collective in which each file is opened by one rank.

    Raises:
        FileNotFoundError, ValueError: see `open_arrays`.
    """
    succeed_together(communicator, source.check, "hvdlocal.data.names")
    facts = {"number of files": len(source.paths), "inputs": source.inputs, "targets": source.targets}
    require_agreement(communicator, facts, "hvdlocal.data.agreement")
    files = open_each(source.paths, lambda path: inspect_arrays(path, source.names), communicator)
    succeed_together(communicator, lambda: _check_files(source, files), "hvdlocal.data.files")
    return files


def _check_files(source: NamedArrays, files: Sequence[ForeignArrays]) -> None:
    for column, name in enumerate(source.names):
        found = [file.arrays[column] for file in files]
        for path, array in zip(source.paths, found, strict=True):
            if (array.dtype, array.shape[1:]) != (found[0].dtype, found[0].shape[1:]):
                raise ValueError(
                    f"{path} holds {name} as {_sample_of(array)} per sample, and {source.paths[0]} as {_sample_of(found[0])}; "
                    "bring all files to one type and shape"
                )
        refuse_twice(source.paths, found)


def _sample_of(array: Found) -> str:
    return f"{array.dtype} {array.shape[1:]}"


def named_by(source: NamedArrays, files: Sequence[ForeignArrays]) -> Named:
    """The arrays of all files, column by column."""
    return Named(source.paths, [[file.arrays[column] for file in files] for column in range(len(source.names))])


def extents_of(source: NamedArrays, files: Sequence[ForeignArrays]) -> list[list[Contiguous]]:
    """For each array, where it lies in each file, by this rank's paths."""
    return [
        [
            dataclasses.replace(file.arrays[column].extent, path=holder_of(path, file.arrays[column]))
            for path, file in zip(source.paths, files, strict=True)
        ]
        for column in range(len(source.names))
    ]


def obstacle_in(source: NamedArrays, columns: Sequence[Sequence[Contiguous]]) -> str | None:
    """Why samples must be unpacked, "mine.h5: x is chunked or compressed"; None if all lie in their files as they are."""
    for name, extents in zip(source.names, columns, strict=True):
        for path, extent in zip(source.paths, extents, strict=True):
            if isinstance(extent, Unmappable):
                return f"{path}: {name} is {extent.obstacle}"
    return None


def layout_of(extents: Sequence[Contiguous], starts: NDArray[np.int64]) -> Layout:
    """How an array in several files is one line of samples; `starts` has the first sample of each file, and their number."""
    return Layout(extents, extents[0].data_bytes // int(starts[1]), None, starts)


def _names(names: str) -> tuple[str, ...]:
    return tuple(name.strip().strip("/") for name in names.split(","))
