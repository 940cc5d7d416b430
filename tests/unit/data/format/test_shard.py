"""The shard format: what open_shard and Shard demand, tell and refuse."""

import dataclasses
import multiprocessing
import os
import signal
import zlib

import h5py
import numpy as np
import pytest

from hvdlocal.data.format.manifest import Manifest, ShardEntry
from hvdlocal.data.format.shard import content_sha256, open_shard, shard_attributes
from hvdlocal.data.kinds import KINDS
from hvdlocal.data.write.shard_writer import write_shard

SHAPE = (4, 3, 2)
ATTRIBUTES = shard_attributes(Manifest("train", "images", {"shape": SHAPE, "classes": ["a"]}, 0))
IMAGES = np.arange(72, dtype="u1").reshape(3, *SHAPE)
GOOD = {
    "images": IMAGES,
    "labels": np.zeros(3, "<i4"),
    "index": np.arange(3, dtype="<i8"),
    "crc32": np.array([zlib.crc32(IMAGES)], "<u4"),
}
JPEG = np.arange(90, dtype="u1")
GOOD_JPEG = {
    "jpeg": JPEG,
    "offsets": np.array([0, 20, 50, 90], "<u8"),
    "dims": np.array([[4, 5], [6, 7], [8, 9]], "<u2"),
    "labels": np.zeros(3, "<i4"),
    "index": np.arange(3, dtype="<i8"),
    "crc32": np.array([zlib.crc32(JPEG[:20]), zlib.crc32(JPEG[20:50]), zlib.crc32(JPEG[50:])], "<u4"),
}


def foreign(path, good, *, userblock_size=0, attributes=ATTRIBUTES, **changes):
    """A shard by another writer, and what a manifest would say of it."""
    with h5py.File(path, "w", userblock_size=userblock_size) as file:
        file.attrs.update(attributes)
        for name, data in (good | changes).items():
            if data is not None:
                file.create_dataset(name, **(data if isinstance(data, dict) else {"data": data}))
    manifest = manifest_of(good)
    entry = ShardEntry(path.name, 3, path.stat().st_size, content_sha256(KINDS[manifest.kind], good_tables(good)))
    return path, entry, manifest


def good_tables(good):
    return {name: array for name, array in good.items() if name not in ("images", "jpeg")}


def manifest_of(good, classes=("a",)):
    kind, shape = ("jpeg", None) if "jpeg" in good else ("images", SHAPE)
    return Manifest("train", kind, {"shape": shape, "classes": classes}, 0)


@pytest.mark.parametrize("userblock_size", [0, 512])  # the second is not what the format asks for, but harmless
@pytest.mark.parametrize("good", [GOOD, GOOD_JPEG], ids=["images", "jpeg"])
def test_a_foreign_shard_is_welcome(tmp_path, good, userblock_size):
    path, entry, manifest = foreign(tmp_path / "a.h5", good, userblock_size=userblock_size)
    shard = open_shard(path, entry, manifest)
    (column,) = shard.columns
    raw = path.read_bytes()[column.data_offset : column.data_offset + column.data_bytes]
    assert raw == next(iter(good.values())).tobytes()
    assert column.unit_bounds.tolist() == ([0, 72] if good is GOOD else [0, 20, 50, 90])
    assert [shard.tables[name].dtype for name in ("labels", "index", "crc32")] == [np.int32, np.int64, np.uint32]
    for unit in range(len(column.crc32)):
        column.check_unit(unit, raw[slice(*column.unit_bounds[unit : unit + 2])])
    shard.verify()
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((3, *SHAPE), "u2")}, r"holds /images as uint16.*where uint8"),
        ({"images": np.zeros((4, *SHAPE), "u1")}, r"holds /images as uint8 \(4, 4, 3, 2\) where uint8 \(3, 4, 3, 2\)"),
        ({"images": {"data": IMAGES, "chunks": (1, *SHAPE)}}, "h5repack -l images:CONTI"),
        ({"images": {"data": IMAGES, "compression": "gzip"}}, "h5repack"),
        ({"images": {"shape": (3, *SHAPE), "dtype": "u1"}}, "does not hold the 72 bytes of /images"),
        (
            {"images": {"shape": (3, *SHAPE), "dtype": "u1"}, "userblock_size": 512},
            "does not hold the 72 bytes of /images",
        ),
        ({"images": {"shape": (3, *SHAPE), "dtype": "u1", "external": "raw.bin"}}, "in another file"),
        ({"images": None, "jpeg": JPEG}, "no dataset /images"),
        ({"labels": np.zeros(3, "<i8")}, "holds /labels as int64"),
        ({"labels": np.zeros(3, ">i4")}, "holds /labels as >i4"),
        ({"crc32": np.zeros(3, "<u4")}, r"holds /crc32 as uint32 \(3,\) where uint32 \(1,\)"),
        ({"index": None}, "no dataset /index"),
        ({"index": np.arange(1, 4, dtype="<i8")}, r"is not the shard that manifest\.json describes"),
        ({"attributes": ATTRIBUTES | {"version": 2}}, "has version 2 where 1 is expected"),
        ({"attributes": ATTRIBUTES | {"seed": 5}}, "has seed 5 where 0 is expected"),
        ({"attributes": {}}, "has format None where hvdlocal-shards is expected"),
    ],
)
def test_a_malformed_image_shard_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"a\.h5.*{message}"):
        open_shard(*foreign(tmp_path / "a.h5", GOOD, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jpeg": JPEG[:80]}, r"holds /jpeg as uint8 \(80,\) where uint8 \(90,\)"),
        ({"jpeg": {"data": JPEG, "chunks": (30,)}}, "h5repack -l jpeg:CONTI"),
        ({"offsets": np.array([0, 20, 50, 90], "<i8")}, "holds /offsets as int64"),
        ({"offsets": np.array([0, 50, 20, 90], "<u8")}, "do not begin at 0 and ascend"),
        ({"offsets": np.array([0, 20, 20, 90], "<u8")}, "do not begin at 0 and ascend"),
        ({"offsets": np.array([1, 20, 50, 90], "<u8")}, "do not begin at 0 and ascend"),
        ({"offsets": np.array([0, 20, 90], "<u8")}, r"holds /offsets as uint64 \(3,\)"),
        ({"dims": np.zeros((3, 3), "<u2")}, r"holds /dims as uint16 \(3, 3\)"),
        ({"dims": None}, "no dataset /dims"),
        ({"dims": GOOD_JPEG["dims"] + np.uint16(1)}, r"is not the shard that manifest\.json describes"),
        ({"crc32": np.zeros(1, "<u4")}, r"holds /crc32 as uint32 \(1,\) where uint32 \(3,\)"),
    ],
)
def test_a_malformed_jpeg_shard_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"a\.h5.*{message}"):
        open_shard(*foreign(tmp_path / "a.h5", GOOD_JPEG, **changes))


def test_other_files_are_refused(tmp_path):
    path, entry, manifest = foreign(tmp_path / "a.h5", GOOD)
    with pytest.raises(ValueError, match=rf"{path} has {entry.bytes} bytes where the manifest says {entry.bytes + 1}"):
        open_shard(path, dataclasses.replace(entry, bytes=entry.bytes + 1), manifest)
    path.write_bytes(b"x" * entry.bytes)
    with pytest.raises(ValueError, match="cannot be opened as HDF5"):
        open_shard(path, entry, manifest)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"shard {path} is missing; copy it again, or write"):
        open_shard(path, entry, manifest)


@pytest.mark.parametrize("good", [GOOD, GOOD_JPEG], ids=["images", "jpeg"])
def test_a_damaged_header_is_an_error_of_the_file(tmp_path, good):
    path, manifest, tables = tmp_path / "a.h5", manifest_of(good), good_tables(good)
    del tables["crc32"]
    units = [IMAGES] if good is GOOD else [JPEG[:20], JPEG[20:50], JPEG[50:]]
    sha256 = write_shard(path, manifest, 3, [units], tables)
    entry = ShardEntry("a.h5", 3, path.stat().st_size, sha256)
    # In a process of its own, since HDF5 itself may crash on a damaged header.
    child = multiprocessing.get_context("spawn").Process(target=flip_bytes, args=(path, entry, manifest, 600))
    child.start()
    child.join(timeout=120)
    child.kill()
    said = path.with_suffix(".said").read_text().splitlines()
    assert all(line.startswith(("ValueError", "DamagedDataError")) and str(path) in line for line in said)
    assert child.exitcode in (0, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT)
    if child.exitcode == 0:
        assert len(said) > 50
        assert any(" is damaged (" in message for message in said)


def flip_bytes(path, entry, manifest, times):
    """Opens the shard so often with a byte of its first 4 KiB changed, and notes every error in a file beside it."""
    raw = path.read_bytes()
    random = np.random.RandomState(0)
    with path.with_suffix(".said").open("w") as said:
        for _ in range(times):
            content = bytearray(raw)
            content[random.randint(min(len(raw), 4096))] ^= random.randint(1, 256)
            path.write_bytes(content)
            try:
                open_shard(path, entry, manifest).verify()
            except Exception as error:
                said.write(f"{type(error).__name__}: {error}".replace("\n", " ") + "\n")
                said.flush()


def test_labels_beyond_the_classes(tmp_path):
    manifest = manifest_of(GOOD, ("a", "b"))
    tables = {"labels": np.array([0, 1, 2]), "index": np.arange(3)}
    sha256 = write_shard(tmp_path / "a.h5", manifest, 3, [[IMAGES]], tables)
    entry = ShardEntry("a.h5", 3, (tmp_path / "a.h5").stat().st_size, sha256)
    with pytest.raises(ValueError, match=r"labels 0\.\.2 but names 2 classes"):
        open_shard(tmp_path / "a.h5", entry, manifest)


def test_verify_reads_in_large_pieces(tmp_path, monkeypatch):
    """24 MiB of images, 192 KiB a unit: three reads of some 8 MiB."""
    images = np.random.RandomState(0).randint(0, 256, (8192, 32, 32, 3)).astype(np.uint8)
    path = tmp_path / "a.h5"
    blocks = (images[start : start + 64] for start in range(0, 8192, 64))
    manifest = Manifest("train", "images", {"shape": (32, 32, 3), "classes": ("a",)}, 0)
    tables = {"labels": np.zeros(8192), "index": np.arange(8192)}
    sha256 = write_shard(path, manifest, 8192, [blocks], tables)
    shard = open_shard(path, ShardEntry("a.h5", 8192, path.stat().st_size, sha256), manifest)
    reads = []
    original = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, offset: (reads.append(len(buffers[0])), original(fd, buffers, offset))[1]
    )
    shard.verify()
    assert sum(reads) == images.nbytes
    assert min(reads[:-1]) > 7 << 20
    with path.open("r+b") as file:
        file.truncate(shard.columns[0].data_offset + images.nbytes - 1)
    with pytest.raises(ValueError, match="it is cut off"):
        shard.verify()


def test_large_shards_are_aligned_to_a_mebibyte(tmp_path, monkeypatch):
    monkeypatch.setattr("hvdlocal.data.write.shard_writer._LARGE_FILE_BYTES", 2000)
    tables = {"dims": np.zeros((3, 2)), "labels": np.zeros(3), "index": np.arange(3)}
    for length, offset in ((1, 2048), (1 << 20, 1 << 20)):
        tables["offsets"] = np.arange(4) * length
        write_shard(tmp_path / f"{length}.h5", manifest_of(GOOD_JPEG), 3, [[b"x" * length] * 3], tables)
        with h5py.File(tmp_path / f"{length}.h5") as file:
            found = file["jpeg"].id.get_offset()
            assert file["jpeg"][:].tobytes() == b"x" * 3 * length
        assert found % offset == 0 or length == 1
    assert (tmp_path / "1.h5").stat().st_size < 20_000
