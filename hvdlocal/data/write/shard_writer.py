"""Writing one shard file (format version 1, docs/data-format.md). Writing the same twice gives the same bytes.

HDF5 lays the file out; the bytes are then written to their places directly. So a full disk is an error like any other, where
HDF5 would lose the file in its hands and, in the end, the process.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.format.shard import CRC_BLOCK, content_sha256

_LARGE_FILE_BYTES = 256 << 20
_BUFFER_BYTES = 8 << 20


def write_image_shard(
    path: Path,
    blocks: Iterable[NDArray[np.uint8]],
    shape: tuple[int, int, int, int],
    labels: NDArray[np.int32],
    index: NDArray[np.int64],
    attributes: Mapping[str, str | int],
) -> str:
    """Writes a shard of equally sized images and flushes it to the disk.

    Args:
        path: the file; replaced if it exists.
        blocks: the images as consecutive, C-contiguous uint8 (CRC_BLOCK, H, W, C) arrays; the last may be shorter.
        shape: (n, H, W, C).
        labels: int32 (n,).
        index: int64 (n,), source index of each sample.
        attributes: see `shard_attributes`.

    Returns:
        The `content_sha256` of what was to be written; it has not been read back.
    """
    n, units = len(labels), -(-len(labels) // CRC_BLOCK)
    layout = {"images": ("<u1", shape), "labels": ("<i4", (n,)), "index": ("<i8", (n,)), "crc32": ("<u4", (units,))}
    places = _lay_out(path, layout, attributes)
    with path.open("r+b", _BUFFER_BYTES) as file:
        checksums = _write_units(file, places["images"], (block.data for block in blocks))
        arrays = {"labels": labels.astype("<i4"), "index": index.astype("<i8"), "crc32": checksums}
        _write_arrays(file, places, arrays)
    return content_sha256(labels, index, checksums)


def write_jpeg_shard(
    path: Path,
    files: Sequence[bytes],
    dims: NDArray[np.uint16],
    labels: NDArray[np.int32],
    index: NDArray[np.int64],
    attributes: Mapping[str, str | int],
) -> str:
    """Writes a shard of JPEG files, one after the other, and flushes it to the disk.

    Args:
        files: the content of the n JPEG files.
        dims: uint16 (n, 2), height and width of each.
        path, labels, index, attributes: as in `write_image_shard`.

    Returns:
        As `write_image_shard`.
    """
    n, offsets = len(files), np.cumsum([0] + [len(content) for content in files], dtype="<u8")
    layout = {
        "jpeg": ("<u1", (int(offsets[-1]),)),
        "offsets": ("<u8", (n + 1,)),
        "dims": ("<u2", (n, 2)),
        "labels": ("<i4", (n,)),
        "index": ("<i8", (n,)),
        "crc32": ("<u4", (n,)),
    }
    places = _lay_out(path, layout, attributes)
    with path.open("r+b", _BUFFER_BYTES) as file:
        checksums = _write_units(file, places["jpeg"], files)
        arrays = {
            "offsets": offsets,
            "dims": dims.astype("<u2"),
            "labels": labels.astype("<i4"),
            "index": index.astype("<i8"),
            "crc32": checksums,
        }
        _write_arrays(file, places, arrays)
    return content_sha256(labels, index, checksums, offsets, dims)


def _lay_out(
    path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]], attributes: Mapping[str, str | int]
) -> dict[str, int]:
    """Creates the file with all its datasets, their bytes not yet written; returns where each begins."""
    # Times would make every write differ. A page-aligned start suits direct I/O; the stripes of a parallel file system
    # are a MiB or more, worth the padding in a large file. Old HDF5 must be able to read it.
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    total = sum(np.dtype(kind).itemsize * int(np.prod(shape)) for kind, shape in layout.values())
    alignment = 1 << 20 if total >= _LARGE_FILE_BYTES else 4096
    with h5py.File(
        path,
        "w",
        libver=("earliest", "v110"),
        alignment_threshold=alignment,
        alignment_interval=alignment,
        locking=False,
    ) as file:
        places = {}
        for name, (kind, shape) in layout.items():
            space, element = h5py.h5s.create_simple(shape), h5py.h5t.py_create(np.dtype(kind))
            places[name] = h5py.h5d.create(file.id, name.encode(), element, space, creation).get_offset()
        file.attrs.update(attributes)
        file.attrs["writer"] = f"h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}"
    return places


def _write_units(file: BinaryIO, offset: int, units: Iterable[bytes | memoryview]) -> NDArray[np.uint32]:
    """Writes the units one after the other; returns their checksums."""
    checksums = []
    file.seek(offset)
    for unit in units:
        file.write(unit)
        checksums.append(zlib.crc32(unit))
    return np.array(checksums, "<u4")


def _write_arrays(file: BinaryIO, places: Mapping[str, int], arrays: Mapping[str, NDArray]) -> None:
    for name, array in arrays.items():
        file.seek(places[name])
        file.write(array.tobytes())
    file.flush()
    os.fsync(file.fileno())
