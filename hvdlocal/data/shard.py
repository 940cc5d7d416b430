"""One shard file (format version 1, docs/data-format.md): writing it, opening it, checking it."""

import hashlib
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.manifest import FORMAT, VERSION, classes_sha256

CRC_BLOCK = 64  # samples per checksum: small enough to name the damage, large enough to cost 0.02 % of the bytes

_REWRITE = "write the data set again (python -m data_prep … --overwrite)"


@dataclass(frozen=True)
class Shard:
    """An open shard. No HDF5 handle stays open: ``images`` is a read-only memory map of the file.

    Attributes:
        path: the file.
        images: uint8 (n, H, W, C).
        labels: int32 (n,).
        index: int64 (n,), position of each sample in the source data set.
        crc32: uint32 (ceil(n / 64),), checksum of each block of 64 images.
    """

    path: Path
    images: NDArray[np.uint8]
    labels: NDArray[np.int32]
    index: NDArray[np.int64]
    crc32: NDArray[np.uint32]

    @property
    def sha256(self) -> str:
        """Digest of labels, index and checksums: identifies the content for the price of a few bytes per sample."""
        return content_sha256(self.labels, self.index, self.crc32)

    def verify(self) -> None:
        """Read every image and compare checksums. Raises ValueError naming the file and samples of a damaged block."""
        for block, expected in enumerate(self.crc32):
            start = block * CRC_BLOCK
            stop = min(start + CRC_BLOCK, len(self.images))
            found = zlib.crc32(self.images[start:stop].data)
            if found != expected:
                raise ValueError(
                    f"{self.path} is damaged in samples {start}..{stop - 1}: their crc32 is {found:08x}, "
                    f"{expected:08x} was written; copy the file again, or {_REWRITE}"
                )


def content_sha256(labels: NDArray[np.int32], index: NDArray[np.int64], crc32: NDArray[np.uint32]) -> str:
    """Hex sha256 over the little-endian bytes of labels, index and crc32, in this order."""
    digest = hashlib.sha256()
    for array in (labels.astype("<i4"), index.astype("<i8"), crc32.astype("<u4")):
        digest.update(array.tobytes())
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


def write_shard(
    path: Path,
    blocks: Iterable[NDArray[np.uint8]],
    shape: tuple[int, int, int, int],
    labels: NDArray[np.int32],
    index: NDArray[np.int64],
    attributes: Mapping[str, str | int],
) -> str:
    """Write one shard file and flush it to the disk. Writing the same twice gives the same bytes.

    Args:
        path: the file; replaced if it exists.
        blocks: the images as consecutive uint8 (CRC_BLOCK, H, W, C) arrays; the last may be shorter.
        shape: (n, H, W, C).
        labels: int32 (n,).
        index: int64 (n,), source index of each sample.
        attributes: see ``shard_attributes``.

    Returns:
        The ``content_sha256`` of what was to be written; it has not been read back.
    """
    crc32 = []
    # Old HDF5 must be able to read the file, times would make every write differ, and a page-aligned start suits
    # direct I/O.
    with h5py.File(
        path, "w", libver=("earliest", "v110"), alignment_threshold=4096, alignment_interval=4096, locking=False
    ) as file:
        images = file.create_dataset("images", shape, "u1", track_times=False)
        start = 0
        for block in blocks:
            images[start : start + len(block)] = block
            crc32.append(zlib.crc32(block.data))
            start += len(block)
        checksums = np.array(crc32, "<u4")
        for name, data in (("labels", labels.astype("<i4")), ("index", index.astype("<i8")), ("crc32", checksums)):
            file.create_dataset(name, data=data, track_times=False)
        file.attrs.update(attributes)
        file.attrs["writer"] = f"h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}"
    with path.open("rb") as written:
        os.fsync(written.fileno())
    return content_sha256(labels, index, checksums)


def open_shard(path: Path, shape: tuple[int, int, int, int], attributes: Mapping[str, str | int]) -> Shard:
    """Open a shard and check everything that can be checked without reading the images.

    Args:
        path: the file.
        shape: (n, H, W, C) that it should hold.
        attributes: the ``shard_attributes`` that it should carry.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is truncated, not a shard of this format, or not the shard that was expected.
    """
    if not path.is_file():
        raise FileNotFoundError(f"shard {path} is missing; copy it again, or {_REWRITE}")
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be opened as HDF5 ({error}); unless this program holds it open, copy it again, or {_REWRITE}"
        ) from error
    with file:
        for name, expected in attributes.items():
            found = file.attrs.get(name)
            if found != expected:
                raise ValueError(
                    f"{path} has {name} {found} where {expected} is expected: it is another data set's; {_REWRITE}"
                )
        n = shape[0]
        offset = _data_offset(path, file, shape)
        labels = _read(path, file, "labels", "<i4", n)
        index = _read(path, file, "index", "<i8", n)
        crc32 = _read(path, file, "crc32", "<u4", -(-n // CRC_BLOCK))
    images = np.memmap(path, np.uint8, "r", offset, shape)
    return Shard(path, images, labels.astype(np.int32), index.astype(np.int64), crc32.astype(np.uint32))


def _data_offset(path: Path, file: h5py.File, shape: tuple[int, ...]) -> int:
    """Byte offset of /images in the file, after making sure that the raw pixels do lie there in one piece."""
    images = _dataset(path, file, "images", "u1", shape)
    if images.id.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS:
        raise ValueError(
            f"{path} stores /images chunked, compact or virtual, which cannot be mapped; "
            "rewrite it with `h5repack -l images:CONTI`"
        )
    offset, num_bytes = images.id.get_offset(), int(np.prod(shape))
    # The size is the test: with a user block, get_offset() of data never written is (user block - 1) instead of None.
    unstored = offset is None or images.id.get_storage_size() != num_bytes
    if unstored or path.stat().st_size < offset + num_bytes:
        raise ValueError(
            f"{path} does not hold the {num_bytes} bytes of /images (never written, cut off, or "
            f"in another file); {_REWRITE}"
        )
    return int(offset)


def _read(path: Path, file: h5py.File, name: str, dtype: str, length: int) -> np.ndarray:
    return np.asarray(_dataset(path, file, name, dtype, (length,))[:])


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
