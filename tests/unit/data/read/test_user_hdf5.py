"""Reading HDF5 files that hvdlocal did not write."""

import os
import pickle
from itertools import pairwise

import h5py
import numpy as np
import pytest

from hvdlocal.data import ShardWriter
from hvdlocal.data.read.user_hdf5 import open_hdf5

N, SHAPE = 1000, (20, 10, 3)


def content(n=N, shape=SHAPE):
    random = np.random.RandomState(0)
    return random.randint(0, 256, (n, *shape)).astype(np.uint8), np.arange(n) * 7 % 5


def write(path, images=None, labels=None, *, names=("images", "labels"), userblock_size=0, **options):
    default_images, default_labels = content()
    images = default_images if images is None else images
    labels = default_labels if labels is None else labels
    with h5py.File(path, "w", userblock_size=userblock_size) as file:
        file.create_dataset(names[0], data=images, **options)
        file.create_dataset(names[1], data=labels)
    return path


LAYOUTS = {
    "contiguous": {},
    "userblock": {"userblock_size": 512},
    "chunk-1": {"chunks": (1, *SHAPE)},
    "chunk-64": {"chunks": (64, *SHAPE)},
    "chunk-in-all-axes": {"chunks": (300, 7, 10, 2)},
    "gzip": {"chunks": (100, *SHAPE), "compression": "gzip", "shuffle": True},
    "fletcher32": {"chunks": (100, *SHAPE), "fletcher32": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_data_set(tmp_path, layout):
    images, labels = content()
    dataset = open_hdf5(write(tmp_path / "a.h5", **LAYOUTS[layout]))
    rows = np.random.RandomState(1).permutation(N)
    np.testing.assert_array_equal(dataset.take(rows), images[rows])
    np.testing.assert_array_equal(dataset.labels, labels)
    np.testing.assert_array_equal(dataset.index, np.arange(N))
    assert dataset.labels.dtype == np.int32
    assert (len(dataset), dataset.kind, dataset.shape, dataset.dims) == (N, "images", SHAPE, None)
    assert dataset.classes == ("0", "1", "2", "3", "4")
    assert not dataset.shuffled
    np.testing.assert_allclose(dataset.mean, images.mean((0, 1, 2)) / 255, rtol=1e-12)
    np.testing.assert_allclose(dataset.std, images.std((0, 1, 2)) / 255, rtol=1e-9)
    assert dataset.fingerprint == open_hdf5(write(tmp_path / "b.h5")).fingerprint
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE | h5py.h5f.OBJ_DATASET) == 0


@pytest.mark.parametrize("storage", ["ram", "mmap", "stream"])
def test_several_files_in_every_storage(tmp_path, storage):
    images, labels = content()
    bounds = [0, 10, 700, N]
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    paths = [write(tmp_path / f"{part.start}.h5", images[part], labels[part]) for part in parts]
    dataset = open_hdf5(paths, storage=storage)
    rows = np.random.RandomState(1).permutation(N)
    np.testing.assert_array_equal(dataset.take(rows), images[rows])
    np.testing.assert_array_equal(dataset.labels, labels)
    assert dataset.storage == storage
    assert dataset.fingerprint == open_hdf5(write(tmp_path / "whole.h5")).fingerprint
    assert dataset.name_of(700).startswith("700.h5 sample 0 (bytes ")
    again = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(again.take(rows), images[rows])
    assert (again.mean, again.fingerprint) == (dataset.mean, dataset.fingerprint)


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    images, labels = content()
    found = {open_hdf5(write(tmp_path / "a.h5")).fingerprint}
    found.add(open_hdf5(tmp_path / "a.h5", classes=["a", "b", "c", "d", "e"]).fingerprint)
    found.add(open_hdf5(write(tmp_path / "b.h5", labels=labels[::-1])).fingerprint)
    images[-1, -1, -1, -1] ^= 1
    found.add(open_hdf5(write(tmp_path / "c.h5", images)).fingerprint)
    found.add(open_hdf5(write(tmp_path / "d.h5", images.reshape(N, 10, 20, 3))).fingerprint)
    assert len(found) == 5


@pytest.mark.parametrize("dtype", ["i1", "u1", ">i2", "<u8", "i8"])
def test_labels_of_any_integer_type(tmp_path, dtype):
    _, labels = content()
    dataset = open_hdf5(
        write(tmp_path / "a.h5", labels=labels.astype(dtype)[:, None], names=("x/pictures", "y")), "x/pictures", "y"
    )
    np.testing.assert_array_equal(dataset.labels, labels)


@pytest.mark.parametrize("options", [{}, {"chunks": (64, 20, 10)}])
def test_gray_images_get_a_channel(tmp_path, options):
    images, _ = content()
    dataset = open_hdf5(write(tmp_path / "a.h5", images[..., 0], **options))
    assert dataset.shape == (20, 10, 1)
    np.testing.assert_array_equal(dataset.take([5, 3]), images[[5, 3], :, :, :1])
    assert len(dataset.mean) == 1


def test_same_statistics_as_shards(tmp_path):
    manifest = ShardWriter(tmp_path, "train", classes=list("abcde"), num_shards=2).write(*content())
    dataset = open_hdf5(write(tmp_path / "a.h5"))
    np.testing.assert_allclose(dataset.mean, manifest.statistics["mean"], rtol=1e-15)
    np.testing.assert_allclose(dataset.std, manifest.statistics["std"], rtol=1e-15)


def test_chunked_files_are_read_a_run_of_whole_chunks_at_a_time(tmp_path, monkeypatch):
    """In slices of at least 8 MiB that begin at chunks: every chunk is unpacked once."""
    images = np.zeros((3000, 64, 64, 1), np.uint8)
    images[:, 0, 0] = 1  # else they would be taken for images that were never written
    path = write(tmp_path / "a.h5", images, np.zeros(3000, int), chunks=(77, 64, 64, 1), compression="gzip")
    slices = []
    read_direct = h5py.Dataset.read_direct

    def note(self, target, selection):
        slices.append((selection.start, selection.stop))
        read_direct(self, target, selection)

    monkeypatch.setattr(h5py.Dataset, "read_direct", note)
    open_hdf5(path)
    assert slices == [(0, 2079), (2079, 3000)]  # 2079 = 27 chunks of 77, the first multiple not below 8 MiB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((N, 4, 4, 3), np.float32)}, r"holds /images as float32 \(1000, 4, 4, 3\); uint8"),
        ({"images": np.zeros((N, 4), np.uint8)}, r"holds /images as uint8 \(1000, 4\); uint8 \(N, H, W, C\)"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, r"holds /images as uint8 \(0, 4, 4\)"),
        (
            {"labels": np.zeros(N, np.float64)},
            r"holds /labels as float64 \(1000,\); integers, one for each of the 1000",
        ),
        ({"labels": np.zeros(N - 1, int)}, r"holds /labels as int64 \(999,\); integers, one for each of the 1000"),
        ({"labels": np.zeros((N, 10), int)}, r"holds /labels as int64 \(1000, 10\)"),
        ({"labels": np.arange(N) - 1}, r"holds labels -1\.\.998 in /labels; number the classes from 0"),
        ({"labels": np.full(N, 2**40)}, r"holds labels 1099511627776\.\."),
        ({"names": ("x", "y/labels")}, r"has no dataset /images; it has x, y/labels"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    path = write(tmp_path / "a.h5", **changes)
    with pytest.raises(ValueError, match=rf"a\.h5 {message}"):
        open_hdf5(path)


def test_more_refusals(tmp_path):
    path = write(tmp_path / "a.h5")
    with pytest.raises(ValueError, match=r"labels 0\.\.4, but 3 classes take labels 0\.\.2"):
        open_hdf5(path, classes=["a", "b", "c"])
    with pytest.raises(FileNotFoundError, match=r"b\.h5 does not exist"):
        open_hdf5(tmp_path / "b.h5")
    with pytest.raises(ValueError, match="at least one path"):
        open_hdf5([])
    other = write(tmp_path / "other.h5", np.zeros((N, 4, 4), np.uint8))
    with pytest.raises(
        ValueError, match=r"one shape .*\(20, 10, 3\) are in .*a\.h5, and .*other\.h5 of shape \(4, 4, 1\)"
    ):
        open_hdf5([path, other])
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(ValueError, match=r"text\.h5 cannot be opened as HDF5"):
        open_hdf5(tmp_path / "text.h5")
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file.create_dataset("images", (N, 4, 4), "u1")
        file.create_dataset("labels", data=np.zeros(N, int))
    with pytest.raises(ValueError, match=r"empty\.h5 holds no data in /images"):
        open_hdf5(tmp_path / "empty.h5")


def test_compressed_files_are_not_mapped_but_can_be_streamed(tmp_path):
    path = write(tmp_path / "a.h5", chunks=(100, *SHAPE), compression="gzip")
    with pytest.raises(
        ValueError, match=r"storage 'mmap' cannot read .*a\.h5 are chunked or compressed; write them as shards"
    ):
        open_hdf5(path, storage="mmap")
    dataset = open_hdf5(path, storage="stream")
    rows = np.random.RandomState(1).permutation(N)
    np.testing.assert_array_equal(dataset.take(rows), content()[0][rows])
    assert dataset.storage == "stream"


def test_a_damaged_chunk_is_named(tmp_path):
    path = write(tmp_path / "a.h5", chunks=(100, *SHAPE), fletcher32=True)
    with h5py.File(path) as file:
        offset = file["images"].id.get_chunk_info(3).byte_offset
    with path.open("r+b") as file:
        file.seek(offset + 17)
        byte = file.read(1)[0]
        file.seek(offset + 17)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match=r"a\.h5: samples 0\.\.999 of /images cannot be read"):
        open_hdf5(path)


def test_a_file_cut_off(tmp_path):
    path = write(tmp_path / "a.h5")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"a\.h5 cannot be opened as HDF5"):
        open_hdf5(path)


@pytest.mark.parametrize("what", ["time", "labels"])
def test_a_pickle_refuses_other_data(tmp_path, what):
    images, labels = content()
    path = write(tmp_path / "a.h5")
    pickled = pickle.dumps(open_hdf5(path))
    pickle.loads(pickled)
    before = path.stat()
    if what == "labels":  # a copy may bring its times along
        write(path, images, labels[::-1])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"a\.h5 was written again since this data set was opened; open it again"):
        pickle.loads(pickled)


def test_labels_that_are_no_classes(tmp_path):
    labels = np.zeros(N, int)
    labels[3] = 65_535
    path = write(tmp_path / "a.h5", labels=labels)
    assert open_hdf5(path).num_classes == 65_536
    labels[3] = 2**31 - 1
    path = write(tmp_path / "a.h5", labels=labels)
    with pytest.raises(
        ValueError, match=r"labels up to 2147483647 for 1000 images: number the classes from 0, or name"
    ):
        open_hdf5(path)


def refused(path, message):
    with pytest.raises(ValueError, match=message):
        open_hdf5(path)


@pytest.mark.parametrize("name", ["images", "labels"])
def test_chunks_that_were_never_written(tmp_path, name):
    images, labels = content()
    data = {"images": images, "labels": labels}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for key, values in data.items():
            chunks = (100, *values.shape[1:])
            dataset = file.create_dataset(key, values.shape, values.dtype, chunks=chunks)
            dataset[: 900 if key == name else N] = values[: 900 if key == name else N]
    refused(tmp_path / "a.h5", rf"a\.h5 holds 9 of the 10 chunks of /{name}: the others were never written")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file[name][900:] = data[name][900:]
    np.testing.assert_array_equal(open_hdf5(tmp_path / "a.h5").take(np.arange(N)), images)


def test_labels_that_were_never_written(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = content()[0]
        file.create_dataset("labels", (N,), "i8")
    refused(tmp_path / "a.h5", r"a\.h5 holds no data in /labels: they were never written")


def test_virtual_images_without_their_sources(tmp_path):
    images, labels = content()
    layout = h5py.VirtualLayout(images.shape, np.uint8)
    for number in range(2):
        write(tmp_path / f"part{number}.h5", images[500 * number : 500 * (number + 1)])
        source = h5py.VirtualSource(f"part{number}.h5", "images", (500, *SHAPE))
        layout[500 * number : 500 * (number + 1)] = source
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("images", layout)
        file["labels"] = labels
    np.testing.assert_array_equal(open_hdf5(tmp_path / "a.h5").take(np.arange(N)), images)
    (tmp_path / "part1.h5").rename(tmp_path / "elsewhere.h5")
    refused(tmp_path / "a.h5", r"a\.h5 takes /images from part1\.h5, which does not exist: copy it too")
    write(tmp_path / "part1.h5", images[500:], names=("pictures", "labels"))
    refused(tmp_path / "a.h5", r"part1\.h5 has no dataset /images")


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), TypeError("x"), MemoryError()])
def test_damage_inside_of_a_file_is_a_sentence(tmp_path, monkeypatch, error):
    path = write(tmp_path / "a.h5")

    def fail(*_):
        raise error

    monkeypatch.setattr(h5py.File, "get", fail)
    refused(path, r"a\.h5 is damaged: HDF5 says ('?x'?|MemoryError); copy it again")
