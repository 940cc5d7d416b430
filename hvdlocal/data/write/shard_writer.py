"""Writing one shard file (format version 1, docs/data-format.md). Writing the same twice gives the same bytes.

HDF5 lays the file out; the bytes are then written to their places directly. So a full disk is an error like any other, where
HDF5 would lose the file in its hands and, in the end, the process.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.format.manifest import Manifest
from hvdlocal.data.format.shard import content_sha256, shard_attributes
from hvdlocal.data.kinds import KINDS

_LARGE_FILE_BYTES = 256 << 20
_BUFFER_BYTES = 8 << 20


def write_shard(
    path: Path,
    manifest: Manifest,
    samples: int,
    data: Sequence[Iterable[Any]],
    tables: Mapping[str, NDArray[Any]],
) -> str:
    """Writes a shard and flushes it to the disk.

    Args:
        path: the file; replaced if it exists.
        manifest: of the split, as far as it is known: its kind, facts and seed.
        samples: number of samples.
        data: for each column of the kind its units, one after the other: C-contiguous arrays or bytes.
        tables: the kind's tables without "crc32".

    Returns:
        The `content_sha256` of what was to be written; it has not been read back.
    """
    kind = KINDS[manifest.kind]
    expected = kind.tables(manifest.facts, samples)
    content = {name: array.astype(expected[name][0]) for name, array in tables.items()}
    columns = kind.columns(manifest.facts, samples, content)
    layout = {column.name: (column.dtype, column.shape) for column in columns}
    layout |= {name: (np.dtype(dtype), shape) for name, (dtype, shape) in expected.items()}
    places = _lay_out(path, layout, shard_attributes(manifest))
    with path.open("r+b", _BUFFER_BYTES) as file:
        checksums = [
            _write_units(file, places[column.name], units) for column, units in zip(columns, data, strict=True)
        ]
        content["crc32"] = np.concatenate(checksums).reshape(expected["crc32"][1])
        _write_tables(file, places, content)
    return content_sha256(kind, content)


def _lay_out(
    path: Path, layout: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], attributes: Mapping[str, str | int]
) -> dict[str, int]:
    """Creates the file with all its datasets, their bytes not yet written; returns where each begins."""
    # Times would make every write differ. A page-aligned start suits direct I/O; the stripes of a parallel file system
    # are a MiB or more, worth the padding in a large file. Old HDF5 must be able to read it.
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    total = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in layout.values())
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
        for name, (dtype, shape) in layout.items():
            if "/" in name:
                file.require_group(name.rpartition("/")[0])
            space, element = h5py.h5s.create_simple(shape), h5py.h5t.py_create(dtype)
            places[name] = h5py.h5d.create(file.id, name.encode(), element, space, creation).get_offset()
        file.attrs.update(attributes)
        file.attrs["writer"] = f"h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}"
    return places


def _write_units(file: BinaryIO, offset: int, units: Iterable[Any]) -> NDArray[np.uint32]:
    """Writes the units one after the other; returns their checksums."""
    checksums = []
    file.seek(offset)
    for unit in units:
        file.write(unit)
        checksums.append(zlib.crc32(unit))
    return np.array(checksums, "<u4")


def _write_tables(file: BinaryIO, places: Mapping[str, int], tables: Mapping[str, NDArray[Any]]) -> None:
    for name, array in tables.items():
        file.seek(places[name])
        file.write(array.tobytes())
    file.flush()
    os.fsync(file.fileno())
