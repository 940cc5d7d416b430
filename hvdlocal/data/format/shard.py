"""One shard file (format version 1, docs/data-format.md): opening it and checking it. `write/shard_writer.py` writes it."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.errors import DamagedDataError
from hvdlocal.data.format.extent import READ_BYTES, FileReader
from hvdlocal.data.format.hdf5 import is_stored, open_for_reading
from hvdlocal.data.format.manifest import FORMAT, MANIFEST_NAME, VERSION, Manifest, ShardEntry, classes_sha256

CRC_BLOCK = 64  # images per checksum: small enough to name the damage, large enough to cost 0.02 % of the bytes

_REWRITE = "write the data set again (python -m data_prep … --overwrite)"


@dataclass(frozen=True, eq=False)
class Shard:
    """A shard that was opened: its small arrays, and where its data lie. Nothing stays open or mapped.

    The data are the bytes of /images or /jpeg. Each of the checksums covers one *unit* of them: a block of 64 images,
    or one JPEG.

    Attributes:
        path: the file.
        data_offset: position of the data in the file, in bytes.
        data_bytes: length of the data.
        labels: int32 (n,).
        index: int64 (n,), position of each sample in the source data set.
        crc32: uint32 (units,), checksum of each unit.
        unit_bounds: int64 (units + 1,); unit u is made of the bytes unit_bounds[u]:unit_bounds[u + 1] of the data.
        offsets: int64 (n + 1,), the same for samples; None for images, whose size is known.
        dims: uint16 (n, 2), height and width of each JPEG; None for images.
    """

    path: Path
    data_offset: int
    data_bytes: int
    labels: NDArray[np.int32]
    index: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    unit_bounds: NDArray[np.int64]
    offsets: NDArray[np.int64] | None = None
    dims: NDArray[np.uint16] | None = None

    @property
    def sha256(self) -> str:
        """Digest of everything but the data, whose checksums it covers: identifies the content for a few bytes a sample."""
        return content_sha256(self.labels, self.index, self.crc32, self.offsets, self.dims)

    def check_unit(self, unit: int, data: bytes | bytearray | memoryview) -> None:
        """Compares the checksum of a unit's bytes.

        Args:
            unit: its number, in 0..len(crc32)-1.
            data: its bytes, C-contiguous.

        Raises:
            ValueError: they are not what was written; the message names the shard, samples, bytes and checksums.
        """
        found = zlib.crc32(data)
        expected = int(self.crc32[unit])
        if found != expected:
            start, stop = (int(bound) + self.data_offset for bound in self.unit_bounds[unit : unit + 2])
            if self.offsets is None:
                first = unit * CRC_BLOCK
                samples = f"samples {first}..{min(first + CRC_BLOCK, len(self.labels)) - 1}"
            else:
                samples = f"sample {unit}"
            raise DamagedDataError(
                f"{self.path} is damaged in {samples} (bytes {start}..{stop - 1} of the file): their crc32 is "
                f"{found:08x}, {expected:08x} was written; copy the file again, or {_REWRITE}"
            )

    def verify(self) -> None:
        """Reads all data, in pieces of some MiB, and compares every checksum.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: as `check_unit`, for the first damaged unit; or the file is cut off.
        """
        bounds, first = self.unit_bounds, 0
        with closing(FileReader(self)) as reader:
            while first < len(self.crc32):
                last = int(np.searchsorted(bounds, bounds[first] + READ_BYTES, side="right")) - 1
                last = max(last, first + 1)
                reader.read(first, last, memoryview(bytearray(int(bounds[last] - bounds[first]))))
                first = last


def content_sha256(
    labels: NDArray[np.int32],
    index: NDArray[np.int64],
    crc32: NDArray[np.uint32],
    offsets: NDArray[np.integer] | None = None,
    dims: NDArray[np.uint16] | None = None,
) -> str:
    """Hex sha256 over the little-endian bytes of labels, index, crc32 and, if there are any, offsets and dims."""
    digest = hashlib.sha256()
    for array, kind in ((labels, "<i4"), (index, "<i8"), (crc32, "<u4"), (offsets, "<u8"), (dims, "<u2")):
        if array is not None:
            digest.update(array.astype(kind).tobytes())
    return digest.hexdigest()


def shard_attributes(split: str, seed: int, classes: Sequence[str]) -> dict[str, str | int]:
    """The attributes by which a shard file says what it is; a reader expects exactly these values."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "split": split,
        "seed": seed,
        "classes_sha256": classes_sha256(classes),
    }


def open_shard(path: Path, entry: ShardEntry, manifest: Manifest) -> Shard:
    """Opens a shard and checks everything that can be checked without reading its data.

    Args:
        path: the file.
        entry: what the manifest says of it.
        manifest: the split's.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is truncated, not a shard of this format, or not the shard that the manifest describes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"shard {path} is missing; copy it again, or {_REWRITE}")
    if (size := path.stat().st_size) != entry.bytes:
        raise ValueError(f"{path} has {size} bytes where the manifest says {entry.bytes}; copy it again")
    file = open_for_reading(path, f"copy it again, or {_REWRITE}")
    try:
        with file:
            shard = _read_shard(path, file, entry, manifest)
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError, OSError) as error:
        # What h5py and NumPy make of an HDF5 header with wrong bits.
        raise ValueError(f"{path} is damaged ({error}); copy it again, or {_REWRITE}") from error
    if shard.sha256 != entry.sha256:
        raise ValueError(
            f"{path} is not the shard that {MANIFEST_NAME} describes (stale manifest or shard); copy both again"
        )
    labels = shard.labels
    if labels.min() < 0 or labels.max() >= len(manifest.classes):
        raise ValueError(
            f"{path} holds labels {labels.min()}..{labels.max()} but names {len(manifest.classes)} classes; {_REWRITE}"
        )
    return shard


def _read_shard(path: Path, file: h5py.File, entry: ShardEntry, manifest: Manifest) -> Shard:
    _check_attributes(path, file, shard_attributes(manifest.split, manifest.seed, manifest.classes))
    n = entry.num_samples
    labels = _read(path, file, "labels", "<i4", (n,))
    index = _read(path, file, "index", "<i8", (n,))
    if manifest.shape is not None:
        crc32 = _read(path, file, "crc32", "<u4", (-(-n // CRC_BLOCK),))
        sample_bytes = int(np.prod(manifest.shape))
        bounds = np.minimum(np.arange(len(crc32) + 1, dtype=np.int64) * CRC_BLOCK, n) * sample_bytes
        offset = _data_offset(path, file, "images", (n, *manifest.shape))
        return Shard(path, offset, n * sample_bytes, labels, index, crc32, bounds)
    crc32 = _read(path, file, "crc32", "<u4", (n,))
    offsets = _read(path, file, "offsets", "<u8", (n + 1,)).astype(np.int64)
    dims = _read(path, file, "dims", "<u2", (n, 2))
    if offsets[0] != 0 or not (np.diff(offsets) > 0).all():
        raise ValueError(f"{path} holds /offsets that do not begin at 0 and ascend; {_REWRITE}")
    offset = _data_offset(path, file, "jpeg", (int(offsets[-1]),))
    return Shard(path, offset, int(offsets[-1]), labels, index, crc32, offsets, offsets, dims)


def _check_attributes(path: Path, file: h5py.File, attributes: Mapping[str, str | int]) -> None:
    for name, expected in attributes.items():
        found = file.attrs.get(name)
        if np.ndim(found) or found != expected:
            raise ValueError(
                f"{path} has {name} {found} where {expected} is expected: it is another data set's; {_REWRITE}"
            )


def _data_offset(path: Path, file: h5py.File, name: str, shape: tuple[int, ...]) -> int:
    """Byte offset of the data in the file, after making sure that they do lie there raw and in one piece."""
    data = _dataset(path, file, name, "u1", shape)
    if data.id.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS:
        raise ValueError(
            f"{path} stores /{name} chunked, compact or virtual, which cannot be mapped; "
            f"rewrite it with `h5repack -l {name}:CONTI`"
        )
    offset, num_bytes = data.id.get_offset(), int(np.prod(shape))
    if not is_stored(data) or path.stat().st_size < offset + num_bytes:
        raise ValueError(
            f"{path} does not hold the {num_bytes} bytes of /{name} (never written, cut off, or "
            f"in another file); {_REWRITE}"
        )
    return int(offset)


def _read(path: Path, file: h5py.File, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(_dataset(path, file, name, dtype, shape)[:]).astype(np.dtype(dtype).newbyteorder("="))


def _dataset(path: Path, file: h5py.File, name: str, dtype: str, shape: tuple[int, ...]) -> h5py.Dataset:
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{path} has no dataset /{name}; {_REWRITE}")
    if dataset.dtype != np.dtype(dtype) or dataset.shape != shape:
        raise ValueError(
            f"{path} holds /{name} as {dataset.dtype} {dataset.shape} where {np.dtype(dtype)} {shape} is expected; "
            f"{_REWRITE}"
        )
    return dataset
