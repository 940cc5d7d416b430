"""Opening an HDF5 file for reading, and whether its data were ever written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py


def open_for_reading(path: Path, remedy: str) -> h5py.File:
    """Opens a file without locking it, as some file systems have no locks.

    Args:
        path: an existing file.
        remedy: what to do with a file that is damaged, for the message.

    Raises:
        ValueError: it is damaged, is no HDF5 file, is one part of a larger one, is being written, or may not be read.
    """
    held = list(_handles_of_this_process(path))
    if any(handle.get_intent() & h5py.h5f.ACC_RDWR for handle in held):
        raise ValueError(
            f"this program has {path} open for writing, so some of its content may be in memory only: close that h5py.File first"
        )
    # All handles of one process must agree about locks. A file that the process has open already is not locked once more.
    choices: tuple[Any, ...] = (False, True, "best-effort") if held else (False,)
    for locking in choices[:-1]:
        try:
            return h5py.File(path.absolute(), "r", locking=locking)
        except OSError:
            continue
    try:
        return h5py.File(path.absolute(), "r", locking=choices[-1])
    except PermissionError as error:
        raise ValueError(f"{path} may not be read by this user; change its permissions (chmod)") from error
    except (OSError, KeyError, RuntimeError, TypeError, MemoryError) as error:
        said = str(error) or type(error).__name__
        if "driver should be used" in said:
            raise ValueError(
                f"{path} is one part of an HDF5 file in several parts (family or split driver); join them to one file, a "
                "family for instance with `h5repart -family_to_sec2`"
            ) from error
        if "already open for write" in said:
            raise ValueError(
                f"{path} is being written by another program, or that program was killed; wait for its end, or clear the mark "
                "that it left with `h5clear -s`"
            ) from error
        raise ValueError(f"{path} cannot be opened as HDF5 ({said}); {remedy}") from error


def is_stored(dataset: h5py.Dataset) -> bool:
    """Whether the data of a contiguous data set were written and lie in its file."""
    # The size is the test: with a user block, get_offset() of data never written is (user block - 1) instead of None.
    size: int = dataset.id.get_storage_size()
    return dataset.id.get_offset() is not None and size == dataset.size * dataset.dtype.itemsize


def _handles_of_this_process(path: Path) -> Iterator[h5py.h5f.FileID]:
    """The handles by which this process has the file open, under whatever name."""
    wanted = os.stat(path)
    for handle in h5py.h5f.get_obj_ids(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE):
        if handle.get_access_plist().get_driver() == h5py.h5fd.SEC2 and os.path.samestat(
            os.fstat(handle.get_vfd_handle()), wanted
        ):
            yield handle
