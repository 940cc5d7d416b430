import dataclasses
import pickle
import re
import shutil

import h5py
import numpy as np
import pytest

from hvdlocal.data import ShardedDataset, ShardWriter
from hvdlocal.data.format.manifest import Manifest, ShardEntry
from hvdlocal.data.format.shard import content_sha256, open_shard, shard_attributes
from hvdlocal.data.kinds import KINDS
from hvdlocal.data.write.shard_writer import write_shard

SHAPE = (4, 3, 2)


@pytest.fixture
def shard_of(tmp_path):
    return lambda number, count: tmp_path / "train" / f"train-{number:05d}-of-{count:05d}.h5"


def test_properties(make_dataset, source):
    dataset = make_dataset(301, num_shards=3)
    assert len(dataset) == 301
    assert dataset.shape == SHAPE
    assert dataset.num_classes == 5
    assert dataset.classes == ("ant", "bee", "cat", "dog", "eel")
    assert dataset.labels.dtype == np.int32
    np.testing.assert_array_equal(dataset.labels, source(301)[1][dataset.index])


@pytest.mark.parametrize("num_shards", [1, 3, 8])
def test_take_gathers_across_shards(make_dataset, source, num_shards):
    dataset = make_dataset(101, num_shards)
    indices = np.array([100, 0, 50, 50, 33, 34, 99, 0])
    expected = source(101)[0][dataset.index[indices]]
    np.testing.assert_array_equal(dataset.take(indices), expected)
    out = np.zeros((8, *SHAPE), np.uint8)
    assert dataset.take(indices.tolist(), out=out) is out
    np.testing.assert_array_equal(out, expected)
    assert dataset.take([]).shape == (0, *SHAPE)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(
    ("indices", "out", "message"),
    [
        ([0, 10], None, r"0\.\.10 leave the data set of 10"),
        ([-1], None, r"-1\.\.-1 leave"),
        ([0.5], None, "float64"),
        ([[0]], None, r"int64 \(1, 1\)"),
        (np.ones(10, bool), None, "bool"),
        ([0], np.empty((2, *SHAPE), np.uint8), "out is uint8"),
        ([0], np.empty((1, *SHAPE), np.int8), "out is int8"),
        ([0, 1], np.empty((4, *SHAPE), np.uint8)[::2], "C-contiguous"),
    ],
)
def test_take_refuses(make_dataset, num_shards, indices, out, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(10, num_shards).take(indices, out=out)


def test_no_hdf5_handle_stays_open(make_dataset):
    dataset = make_dataset(10)
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == 0
    assert len(dataset.take([1])) == 1


def test_verify_names_the_damaged_samples(make_dataset, shard_of):
    dataset = make_dataset(200, num_shards=2)
    path = shard_of(1, 2)
    with h5py.File(path) as file:
        offset = file["images"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[offset + 70 * 24 + 5] ^= 1 << 3
    path.write_bytes(content)
    assert dataset.take([170])[0].flat[5] != content[offset + 70 * 24 + 5], "what is in memory already stays good"
    with pytest.raises(ValueError, match=rf"{path} is damaged in samples 64\.\.99 \(bytes \d+\.\.\d+ of the file\)"):
        dataset.verify()


def test_truncated_shard(make_dataset, tmp_path, shard_of):
    make_dataset(100, num_shards=2)
    path = shard_of(1, 2)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{path} has \d+ bytes where the manifest says \d+"):
        ShardedDataset(tmp_path)


def test_missing_shard_and_missing_data_set(make_dataset, tmp_path, shard_of):
    make_dataset(100, num_shards=2)
    shard_of(0, 2).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard_of(0, 2)} is missing"):
        ShardedDataset(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"val.manifest.json does not exist.*data_prep"):
        ShardedDataset(tmp_path, "val")


def test_stale_manifest(make_dataset, tmp_path, source, shard_of):
    images, labels = source(100)
    make_dataset(100, num_shards=2)
    images[:, 2] ^= 255  # the same sizes, seed, classes: only the pixels tell
    ShardWriter(tmp_path / "new", "train", classes=("ant", "bee", "cat", "dog", "eel"), num_shards=2).write(
        images, labels
    )
    shutil.copy(tmp_path / "new" / "train" / shard_of(1, 2).name, shard_of(1, 2))
    with pytest.raises(ValueError, match=rf"{shard_of(1, 2)} is not the shard that manifest.json describes"):
        ShardedDataset(tmp_path)


def test_swapped_shards(make_dataset, tmp_path, shard_of):
    make_dataset(100, num_shards=2)
    shard_of(0, 2).rename(tmp_path / "x")
    shard_of(1, 2).rename(shard_of(0, 2))
    (tmp_path / "x").rename(shard_of(1, 2))
    with pytest.raises(ValueError, match=rf"{shard_of(0, 2)} is not the shard"):
        ShardedDataset(tmp_path)


def test_shard_of_another_preparation(make_dataset, tmp_path, shard_of, source):
    make_dataset(100)
    ShardWriter(tmp_path / "new", "train", classes=("ant", "bee", "cat", "dog", "eel"), seed=1).write(*source(100))
    shutil.copy(tmp_path / "new" / "train" / shard_of(0, 1).name, shard_of(0, 1))
    with pytest.raises(ValueError, match=f"{shard_of(0, 1)} has seed 1 where 0 is expected"):
        ShardedDataset(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"ant"', '"ape"', "does not match its fingerprint"),
        ('"version": 1', '"version": 2', "version 2, not 'hvdlocal-shards' version 1"),
        ('"seed"', '"sead"', "it lacks 'seed'"),
        ("{", "", "is not a usable manifest"),
    ],
)
def test_unusable_manifest(make_dataset, tmp_path, old, new, message):
    make_dataset(10)
    path = tmp_path / "train" / "manifest.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        ShardedDataset(tmp_path)


def test_labels_beyond_the_classes(tmp_path):
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "a.h5"
    manifest = manifest_of(("a", "b"))
    tables = {"labels": np.array([0, 1, 2]), "index": np.arange(3)}
    sha256 = write_shard(path, manifest, 3, [[np.zeros((3, *SHAPE), np.uint8)]], tables)
    entry = ShardEntry("a.h5", 3, path.stat().st_size, sha256)
    dataclasses.replace(manifest, shards=(entry,)).save(tmp_path / "train" / "manifest.json")
    with pytest.raises(ValueError, match=r"a\.h5 holds labels 0\.\.2 but names 2 classes"):
        ShardedDataset(tmp_path)


# Files by other writers. Each misses the format in one way.


def manifest_of(classes=("a",)):
    statistics = {"mean": (0.0, 0.0), "std": (1.0, 1.0)}
    return Manifest("train", "images", {"shape": SHAPE, "classes": classes}, 0, statistics)


ATTRIBUTES = shard_attributes(manifest_of())
GOOD = {
    "images": np.zeros((3, *SHAPE), "u1"),
    "labels": np.zeros(3, "<i4"),
    "index": np.arange(3, dtype="<i8"),
    "crc32": np.zeros(1, "<u4"),
}


def foreign_shard(path, *, userblock_size=0, **changes):
    with h5py.File(path, "w", userblock_size=userblock_size) as file:
        file.attrs.update(ATTRIBUTES)
        for name, data in (GOOD | changes).items():
            if data is not None:
                file.create_dataset(name, **(data if isinstance(data, dict) else {"data": data}))
    return path


def test_a_foreign_shard_is_welcome(tmp_path):
    images = np.arange(72, dtype="u1").reshape(3, *SHAPE)
    for userblock_size in (0, 512):  # not what the format asks for, but harmless
        path = foreign_shard(tmp_path / "a.h5", images=images, userblock_size=userblock_size)
        shard = open_as(path)
        (column,) = shard.columns
        found = np.fromfile(path, np.uint8, column.data_bytes, offset=column.data_offset)
        np.testing.assert_array_equal(found.reshape(images.shape), images)


def open_as(path):
    """Opens a shard under a manifest that fits a good one."""
    sha256 = content_sha256(KINDS["images"], {name: GOOD[name] for name in ("labels", "index", "crc32")})
    entry = ShardEntry(path.name, 3, path.stat().st_size, sha256)
    return open_shard(path, entry, manifest_of())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((3, *SHAPE), "u2")}, r"holds /images as uint16.*where uint8"),
        ({"images": np.zeros((4, *SHAPE), "u1")}, r"holds /images as uint8 \(4, 4, 3, 2\) where uint8 \(3, 4, 3, 2\)"),
        ({"images": {"data": GOOD["images"], "chunks": (1, *SHAPE)}}, "h5repack"),
        ({"images": {"data": GOOD["images"], "compression": "gzip"}}, "h5repack"),
        ({"images": {"shape": (3, *SHAPE), "dtype": "u1"}}, "does not hold the 72 bytes of /images"),
        (
            {"images": {"shape": (3, *SHAPE), "dtype": "u1"}, "userblock_size": 512},
            "does not hold the 72 bytes of /images",
        ),
        ({"images": {"shape": (3, *SHAPE), "dtype": "u1", "external": "raw.bin"}}, "in another file"),
        ({"labels": np.zeros(3, "<i8")}, "holds /labels as int64"),
        ({"labels": np.zeros(3, ">i4")}, "holds /labels as >i4"),
        ({"crc32": np.zeros(3, "<u4")}, r"holds /crc32 as uint32 \(3,\) where uint32 \(1,\)"),
        ({"index": None}, "no dataset /index"),
    ],
)
def test_a_malformed_shard_is_refused(tmp_path, changes, message):
    path = foreign_shard(tmp_path / "a.h5", **changes)
    with pytest.raises(ValueError, match=rf"a\.h5.*{message}"):
        open_as(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(b"not HDF5")
    with pytest.raises(ValueError, match="cannot be opened as HDF5"):
        open_as(path)
    path = foreign_shard(tmp_path / "b.h5")
    with h5py.File(path, "a") as file:
        file.attrs["version"] = 2
    with pytest.raises(ValueError, match="has version 2 where 1 is expected"):
        open_as(path)


@pytest.mark.parametrize("storage", ["ram", "mmap", "stream"])
def test_a_pickle_holds_paths(make_dataset, tmp_path, storage):
    make_dataset(5000, num_shards=2)
    dataset = ShardedDataset(tmp_path, storage=storage)
    expected = dataset.take([4999, 0, 17])
    pickled = pickle.dumps(dataset)
    dataset.close()
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    np.testing.assert_array_equal(again.take([4999, 0, 17]), expected)
    assert again.storage == storage
    assert again.fingerprint == dataset.fingerprint


def test_a_closed_data_set(make_dataset):
    with make_dataset(10) as dataset:
        images = dataset.take([3])
        view = dataset.bytes_of(3)
    assert bytes(view) == images.tobytes(), "what was handed out stays"
    with pytest.raises(ValueError, match="was closed"):
        dataset.take([3])
    dataset.close()


def test_names_of_samples(make_dataset, shard_of, source):
    dataset = make_dataset(101, num_shards=3)
    match = re.fullmatch(r"train-00001-of-00003\.h5 sample 7 \(bytes (\d+)\.\.(\d+)\)", dataset.name_of(40))
    start, stop = map(int, match.groups())
    content = shard_of(1, 3).read_bytes()[start : stop + 1]
    assert content == dataset.bytes_of(40) == source(101)[0][dataset.index[40]].tobytes()
    for sample in (-1, 101):
        with pytest.raises(ValueError, match=f"sample {sample} leaves the data set of 101"):
            dataset.bytes_of(sample)


@pytest.mark.parametrize("storage", ["ram", "mmap"])
def test_a_pickle_refuses_other_data(make_dataset, source, tmp_path, storage):
    dataset = make_dataset(40, storage=storage)
    pickled = pickle.dumps(dataset)
    pickle.loads(pickled)
    images, labels = source(40)
    ShardWriter(tmp_path, "train", classes=dataset.classes, overwrite=True).write(images, labels[::-1])
    with pytest.raises(ValueError, match=r"train was written again since this data set was opened; open it again"):
        pickle.loads(pickled)


@pytest.mark.parametrize("stream_bytes", [0, -1])
@pytest.mark.parametrize("storage", ["ram", "stream"])
def test_room_for_nothing_is_refused(make_dataset, storage, stream_bytes):
    with pytest.raises(ValueError, match=f"stream_bytes is {stream_bytes}; choose at least 1"):
        make_dataset(10, storage=storage, stream_bytes=stream_bytes)
