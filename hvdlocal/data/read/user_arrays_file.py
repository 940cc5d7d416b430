"""Named arrays in one file that somebody else wrote: HDF5 of any layout, or .npz."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdlocal.data.kinds.numbers import require_numbers
from hvdlocal.data.read.foreign_extents import Found
from hvdlocal.data.read.hdf5_inspection import Inspection, inspect
from hvdlocal.data.read.npz_file import find_member, is_npy, is_npz


@dataclass(frozen=True)
class ForeignArrays:
    """What was found in one file.

    Attributes:
        arrays: where each array lies, in the order of their names.
        sources: all other files that they come from, each as `Found.holder`.
    """

    arrays: tuple[Found, ...]
    sources: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """Length of every array."""
        return self.arrays[0].shape[0]


def inspect_arrays(path: Path, names: Sequence[str]) -> ForeignArrays:
    """Finds out where arrays lie.

    Args:
        path: an HDF5 or .npz file, whatever its name.
        names: of arrays in it; of HDF5, with their groups: "group/x".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be used, or an array is missing, holds no numbers, or is not as long as the first; the message
            names file and array, and mostly the remedy.
    """
    if path.is_file() and is_npy(path):
        raise ValueError(f"{path} is a .npy file, whose array has no name: write it with numpy.savez or h5py")
    if path.is_file() and is_npz(path):
        found = ForeignArrays(tuple(find_member(path, name) for name in names))
    else:
        found = inspect(path, lambda file: _inspect_hdf5(file, names), ", ".join(names))
    for name, array in zip(names, found.arrays, strict=True):
        if array.shape[0] != found.num_samples:
            raise ValueError(
                f"{path} holds {found.num_samples} samples of {names[0]} but {array.shape[0]} of {name}; write one of each "
                "for every sample"
            )
    return found


def _inspect_hdf5(file: Inspection, names: Sequence[str]) -> ForeignArrays:
    arrays = []
    for name in names:
        dataset = file.dataset(name)
        require_numbers(f"{file.path} holds {name} as", dataset.dtype, dataset.shape)
        arrays.append(file.find(dataset, name))
    return ForeignArrays(tuple(arrays), file.sources)
