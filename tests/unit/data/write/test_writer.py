import time

import h5py
import numpy as np
import pytest

from hvdlocal.data import ShardedDataset, ShardWriter
from hvdlocal.data.format.manifest import Manifest
from hvdlocal.data.permutations import pre_shuffle
from hvdlocal.data.write.shard_writer import write_shard

CLASSES = ("ant", "bee", "cat", "dog", "eel")


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("num_shards", [1, 4])
def test_round_trip_in_the_pre_shuffled_order(make_dataset, source, num_shards):
    images, labels = source(301)
    dataset = make_dataset(301, num_shards, seed=9)
    order = pre_shuffle(9, 301)
    np.testing.assert_array_equal(dataset.index, order)
    np.testing.assert_array_equal(dataset.take(np.arange(301)), images[order])
    np.testing.assert_array_equal(dataset.labels, labels[order])
    dataset.verify()


def test_plain_h5py_reads_a_shard(make_dataset, source, tmp_path):
    make_dataset(130, num_shards=2)
    order = pre_shuffle(0, 130)[65:]
    path = tmp_path / "train" / "train-00001-of-00002.h5"
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["images"][:], source(130)[0][order])
        assert {name: (file[name].dtype.str, file[name].shape) for name in file} == {
            "images": ("|u1", (65, 4, 3, 2)),
            "labels": ("<i4", (65,)),
            "index": ("<i8", (65,)),
            "crc32": ("<u4", (2,)),
        }
        attributes = dict(file.attrs)
        assert (attributes["format"], attributes["version"], attributes["split"]) == ("hvdlocal-shards", 1, "train")
        assert all(file[name].chunks is None for name in file)
        assert file.userblock_size == 0
    assert path.read_bytes()[8] == 0  # superblock version: readable for old HDF5


def test_images_are_aligned(tmp_path):
    ShardWriter(tmp_path, "train", classes=["a"]).write(np.zeros((100, 8, 8, 3), np.uint8), np.zeros(100, int))
    with h5py.File(tmp_path / "train" / "train-00000-of-00001.h5") as file:
        assert file["images"].id.get_offset() % 4096 == 0


def test_two_writes_give_identical_bytes(tmp_path, source):
    for name in ("one", "two"):
        ShardWriter(tmp_path / name, "train", classes=CLASSES, num_shards=3, seed=1).write(*source(200))
        time.sleep(1.1)  # HDF5 would record times in seconds
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(files(tmp_path / "one")) == 4


def test_fingerprint_identifies_the_content(tmp_path, source):
    images, labels = source(50)
    other = images.copy()
    other[17, 2, 2, 1] ^= 1

    def fingerprint(name, images=images, labels=labels, classes=CLASSES, **options):
        return ShardWriter(tmp_path / name, "train", classes=classes, **options).write(images, labels).fingerprint

    reference = fingerprint("a")
    assert fingerprint("b") == reference
    variants = [
        fingerprint("c", images=other),
        fingerprint("d", labels=labels[::-1]),
        fingerprint("e", classes=CLASSES[::-1]),
        fingerprint("f", seed=1),
        fingerprint("g", num_shards=2),
    ]
    assert len({reference, *variants}) == 6


def test_the_format_does_not_drift(tmp_path, source):
    manifest = ShardWriter(tmp_path, "train", classes=CLASSES, num_shards=3, seed=5).write(*source(100))
    assert manifest.fingerprint == "4b51ca5003f412f4a524294e3ec54228469f94fc4a9bc34635de47a99de448c0"
    assert [shard.sha256[:16] for shard in manifest.shards] == [
        "edd27ad7715fc909",
        "41013f6a6f018ab7",
        "3f0bb36698b96347",
    ]


def test_fingerprint_does_not_depend_on_file_sizes(make_dataset, tmp_path):
    dataset = make_dataset(10)
    path = tmp_path / "train" / "manifest.json"
    size = (tmp_path / "train" / "train-00000-of-00001.h5").stat().st_size
    path.write_text(path.read_text().replace(f'"bytes": {size}', '"bytes": 12345'))
    assert Manifest.load(path).fingerprint == dataset.fingerprint


def test_mean_and_std(make_dataset, source):
    dataset = make_dataset(301, num_shards=2)
    pixels = source(301)[0] / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-13)
    np.testing.assert_allclose(dataset.std, pixels.std(axis=(0, 1, 2)), rtol=1e-13)


def test_source_is_read_lazily_in_ascending_pieces(tmp_path, source):
    images, labels = source(300)

    class Lazy:
        shape, dtype = images.shape, images.dtype
        pieces: list = []  # noqa: RUF012

        def __getitem__(self, rows):
            self.pieces.append(rows)
            return images[rows]

    writer = ShardWriter(tmp_path, "train", classes=CLASSES, num_shards=2)
    writer.write(Lazy(), labels, identity="images of a test")
    assert max(len(rows) for rows in Lazy.pieces) <= 64
    assert all((np.diff(rows) > 0).all() for rows in Lazy.pieces)
    np.testing.assert_array_equal(np.sort(np.concatenate(Lazy.pieces)), np.arange(300))
    Lazy.pieces.clear()
    writer.write(Lazy(), labels, identity="images of a test")
    assert not Lazy.pieces, "known by their identity, they need not be read again"


def test_the_content_decides_where_no_identity_is_given(tmp_path, source):
    images, labels = source(100)
    writer = ShardWriter(tmp_path, "train", classes=CLASSES)
    plan = writer.write(images, labels).plan
    assert writer.write(images.copy(order="F"), labels).plan == plan
    images[99, 3, 2, 1] ^= 1
    with pytest.raises(FileExistsError, match="different data set"):
        writer.write(images, labels)


def test_an_hdf5_dataset_can_be_the_source(tmp_path, source):
    images, labels = source(100)
    with h5py.File(tmp_path / "source.h5", "w") as file:
        stored = file.create_dataset("pixels", data=images, chunks=(7, 4, 3, 2))
        ShardWriter(tmp_path, "train", classes=CLASSES).write(stored, labels)
    dataset = ShardedDataset(tmp_path)
    np.testing.assert_array_equal(dataset.take(np.argsort(dataset.index)), images)


@pytest.mark.parametrize("form", [lambda labels: labels[:, None], lambda labels: np.eye(5)[labels], list])
def test_labels_of_other_shapes_make_the_same_data_set(tmp_path, source, form):
    images, labels = source(20)
    manifest = ShardWriter(tmp_path, "train", classes=CLASSES).write(images, form(labels))
    assert manifest.plan == ShardWriter(tmp_path / "plain", "train", classes=CLASSES).write(images, labels).plan
    dataset = ShardedDataset(tmp_path)
    np.testing.assert_array_equal(dataset.labels, labels[dataset.index])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: (images[0], labels), r"images are uint8 \(4, 3, 2\)"),
        (lambda images, labels: (images.astype(np.float32), labels), "images are float32"),
        (lambda images, labels: (images[:0], labels[:0]), r"images are uint8 \(0, 4, 3, 2\)"),
        (lambda images, labels: (images[:2], labels[:2]), "2 images cannot fill 3 shards"),
        (lambda images, labels: (images, labels[:-1]), r"labels are int64 \(9,\).*shape \(10,\)"),
        (lambda images, labels: (images, labels / 2), r"labels are float64 .*labels\.astype\(int\)"),
        (
            lambda images, labels: (images, np.full((10, 5), 0.2)),
            r"labels are float64 .*these are not one-hot",
        ),
        (lambda images, labels: (images, np.array(CLASSES)[labels]), r"labels are <U3 .*numpy\.unique"),
        (lambda images, labels: (images, np.array(CLASSES, "S")[labels]), r"labels are \|S3 .*numpy\.unique"),
        (
            lambda images, labels: (np.zeros((10, 3, 8, 8), np.uint8), labels),
            r"shape \(10, 3, 8, 8\) have their channels first; .*numpy\.moveaxis\(images, 1, 3\)",
        ),
        (
            lambda images, labels: (images, np.where(np.arange(10) == 6, 5, labels)),
            "label 5 of sample 6 is out of range",
        ),
        (lambda images, labels: (images, labels - 1), "label -1 of sample 0 is out of range"),
    ],
)
def test_unfit_input_is_refused(tmp_path, source, change, message):
    with pytest.raises(ValueError, match=message):
        ShardWriter(tmp_path, "train", classes=CLASSES, num_shards=3).write(*change(*source(10)))
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": []}, "classes"),
        ({"classes": "abc"}, "classes 'abc'"),
        ({"classes": ["a", "a"]}, "classes"),
        ({"num_shards": 0}, "num_shards is 0"),
        ({"seed": -1}, "seed -1"),
        ({"split": "../train"}, "split name '../train'"),
    ],
)
def test_unfit_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ShardWriter(tmp_path, **({"split": "train", "classes": CLASSES} | options))


def test_identical_data_set_is_left_untouched(make_dataset, tmp_path):
    make_dataset(100, num_shards=2)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (tmp_path / "train").iterdir()}
    make_dataset(100, num_shards=2)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (tmp_path / "train").iterdir()} == before


def test_damaged_data_set_is_written_again(make_dataset, tmp_path):
    make_dataset(100, num_shards=2)
    (tmp_path / "train" / "train-00001-of-00002.h5").unlink()
    make_dataset(100, num_shards=2).verify()


@pytest.mark.parametrize("n", [99, 100])
def test_different_data_set_is_refused_unless_overwrite(make_dataset, tmp_path, source, n):
    make_dataset(100, num_shards=4)
    before = files(tmp_path)
    images, labels = source(n)
    images[50, 1, 1, 1] ^= 1
    with pytest.raises(FileExistsError, match="already holds a different data set"):
        ShardWriter(tmp_path, "train", classes=CLASSES, num_shards=4).write(images, labels)
    assert files(tmp_path) == before

    ShardWriter(tmp_path, "train", classes=CLASSES, num_shards=3, overwrite=True).write(images, labels)
    dataset = ShardedDataset(tmp_path)
    np.testing.assert_array_equal(dataset.take(np.argsort(dataset.index)), images)
    assert len(files(tmp_path)) == 4  # nothing is left of the four old shards


@pytest.mark.parametrize("overwrite", [False, True])
def test_crash_between_shards_and_manifest(make_dataset, tmp_path, source, monkeypatch, overwrite):
    if overwrite:
        make_dataset(80, num_shards=2)
    images, labels = source(100)
    writer = ShardWriter(tmp_path, "train", classes=CLASSES, num_shards=2, overwrite=overwrite)

    def cut_power(manifest, path):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", cut_power)
        with pytest.raises(OSError, match="power cut"):
            writer.write(images, labels)
    with pytest.raises(FileNotFoundError, match="holds no finished data set"):
        ShardedDataset(tmp_path)

    (tmp_path / "train" / ".unfinished" / "train-00000-of-00002.h5.tmp").write_bytes(b"left by a killed writer")
    if overwrite:
        (tmp_path / "train" / "train-00007-of-00009.h5").write_bytes(b"left by another one")
    writer.write(images, labels)
    dataset = ShardedDataset(tmp_path)
    dataset.verify()
    assert len(dataset) == 100
    assert {path.name for path in (tmp_path / "train").iterdir()} == {
        "manifest.json",
        "train-00000-of-00002.h5",
        "train-00001-of-00002.h5",
    }


@pytest.mark.parametrize("name", ["train-00001-of-00002.h5", "train-00003-of-00009.h5"])
def test_shards_without_a_manifest_are_not_touched(tmp_path, source, name):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / name).write_bytes(b"the only copy of somebody's work")
    before = files(tmp_path)
    with pytest.raises(
        FileExistsError,
        match=rf"{name} is there without a manifest\.json; .*with --overwrite \(from Python: overwrite=True\)",
    ):
        ShardWriter(tmp_path, "train", classes=CLASSES, num_shards=2).write(*source(100))
    assert files(tmp_path) == before
    ShardWriter(tmp_path, "train", classes=CLASSES, num_shards=2, overwrite=True).write(*source(100))
    assert len(files(tmp_path)) == 3


def test_a_byte_that_changes_on_its_way_to_the_disk_is_noticed(tmp_path, source, monkeypatch):
    def flipping(path, *arguments):
        sha256 = write_shard(path, *arguments)
        with h5py.File(path) as file:
            offset = file["images"].id.get_offset()
        raw = bytearray(path.read_bytes())
        raw[offset + 70 * 24] ^= 1
        path.write_bytes(raw)
        return sha256

    monkeypatch.setattr("hvdlocal.data.write.image_writer.write_shard", flipping)
    with pytest.raises(ValueError, match=r"is damaged in samples 64\.\.99 "):
        ShardWriter(tmp_path, "train", classes=CLASSES).write(*source(100))
    assert not files(tmp_path)


def test_a_shard_that_vanishes_before_publishing(make_dataset, tmp_path, source, monkeypatch):
    make_dataset(80, num_shards=3)
    before = files(tmp_path)
    manifest_of = ShardWriter._manifest

    def losing(self, *arguments):
        (tmp_path / "train" / ".unfinished" / "train-00001-of-00002.h5").unlink()
        return manifest_of(self, *arguments)

    writer = ShardWriter(tmp_path, "train", classes=CLASSES, num_shards=2, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_manifest", losing)
        with pytest.raises(FileNotFoundError, match=r"train-00001-of-00002\.h5 was removed or changed"):
            writer.write(*source(100))
    assert before.items() <= files(tmp_path).items()
    writer.write(*source(100))
    ShardedDataset(tmp_path).verify()


@pytest.mark.parametrize("num_shards", [1, 2])
def test_failing_source_leaves_only_whole_shards_behind(tmp_path, source, num_shards):
    images, labels = source(100)

    class Broken:
        shape, dtype = images.shape, images.dtype

        def __getitem__(self, rows):
            if 99 in rows:
                raise OSError("unreadable image")
            return images[rows]

    with pytest.raises(OSError, match="unreadable image"):
        ShardWriter(tmp_path, "train", classes=CLASSES, num_shards=num_shards).write(
            Broken(), labels, identity="broken"
        )
    left = [path.name for path in files(tmp_path)]
    position = int(np.flatnonzero(pre_shuffle(0, 100) == 99)[0])
    whole = ["train-00000-of-00002.h5"] if num_shards == 2 and position >= 50 else []
    assert sorted(left) == sorted(whole + [f"{name}.json" for name in whole])
    assert (tmp_path / "train").exists() == bool(whole)
