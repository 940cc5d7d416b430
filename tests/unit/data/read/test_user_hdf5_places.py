"""A user's HDF5 file whose bytes lie somewhere else than its names say: they are read right, or refused."""

import os
import pickle
import subprocess
import sys
import warnings

import h5py
import numpy as np
import pytest
from test_user_hdf5 import SHAPE, N, content, refused, write

from hvdlocal.data import ShardedDataset
from hvdlocal.data.read.user_hdf5 import open_hdf5

STORAGES = ["ram", "mmap", "stream"]


def check(dataset):
    """The data set is that of `content`."""
    images, labels = content()
    rows = np.random.RandomState(1).permutation(N)
    np.testing.assert_array_equal(dataset.take(rows), images[rows])
    np.testing.assert_array_equal(dataset.labels, labels)
    np.testing.assert_array_equal(np.frombuffer(dataset.bytes_of(3), np.uint8), images[3].ravel())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_links(path, images_file="far/source.h5"):
    """The images lie in another file, behind other data, so at another offset than this file's own images would."""
    (path.parent / "far").mkdir(exist_ok=True)
    with h5py.File(path.parent / "far" / "source.h5", "w") as file:
        file["before"] = np.arange(5000)
        file["deep/images"], file["deep/labels"] = content()
    with h5py.File(path, "w") as file:
        file["images"] = h5py.ExternalLink(images_file, "/deep/images")
        file["labels"] = h5py.ExternalLink("far/source.h5", "/deep/labels")
        file["deep"] = h5py.ExternalLink("far/source.h5", "/deep")
        file["soft"] = h5py.SoftLink("/images")
        file["own"] = np.full((N, *SHAPE), 7, np.uint8)
    return path


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ["images", "soft", "deep/images"])
def test_images_behind_a_link(tmp_path, storage, name):
    check(open_hdf5(with_links(tmp_path / "a.h5"), name, storage=storage))


def test_links_of_every_path(here):
    with_links(here / "a.h5")
    (here / "other").mkdir()
    (here / "other" / "link.h5").symlink_to("../a.h5")
    for path in ("a.h5", here / "a.h5", "other/../a.h5", "other/link.h5"):
        check(open_hdf5(path, storage="mmap"))
    check(open_hdf5(with_links(here / "b.h5", str(here / "far" / "source.h5")), storage="stream"))
    assert open_hdf5("a.h5", storage="mmap").name_of(2).startswith("source.h5 sample 2 (bytes ")


def test_a_pickle_notices_a_change_behind_a_link(tmp_path):
    pickled = pickle.dumps(open_hdf5(with_links(tmp_path / "a.h5"), storage="mmap"))
    check(pickle.loads(pickled))
    source = tmp_path / "far" / "source.h5"
    os.utime(source, ns=(0, source.stat().st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"source\.h5 was written again"):
        pickle.loads(pickled)


def test_links_that_lead_nowhere(tmp_path):
    path = with_links(tmp_path / "a.h5", "gone.h5")
    refused(path, r"a\.h5 has a link /images to /deep/images of gone\.h5, where no data set can be opened: copy it too")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["images"] = h5py.SoftLink("/pictures")
    refused(tmp_path / "b.h5", r"b\.h5 has a link /images to /pictures, where no data set can be opened")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["images/train"] = content()[0]
    refused(tmp_path / "c.h5", r"c\.h5 has a group /images, which holds train: name a data set in it")


def with_raw_file(path, images, offset=0, names=("pixels.raw",)):
    share = -(-images.nbytes // len(names))
    external = [(name, offset, h5py.h5f.UNLIMITED if len(names) == 1 else share) for name in names]
    with h5py.File(path, "w") as file:
        file.create_dataset("images", images.shape, images.dtype, external=external)
        file["images"][:] = images
        file["labels"] = content()[1]
    return path


@pytest.mark.parametrize("names", [("pixels.raw",), ("1.raw", "2.raw", "3.raw")])
def test_images_in_raw_files(here, names):
    check(open_hdf5(with_raw_file(here / "a.h5", content()[0], 100, names)))
    with pytest.raises(ValueError, match=r"'mmap' cannot read .*a\.h5 are in raw files beside the HDF5 file"):
        open_hdf5(here / "a.h5", storage="mmap")
    with open(names[-1], "r+b") as file:
        file.truncate(file.seek(0, 2) - 1)
    refused(
        here / "a.h5", rf"a\.h5 takes /images from the raw file {names[-1]}, which has \d+ bytes where \d+ are needed"
    )
    os.remove(names[-1])
    refused(here / "a.h5", rf"a\.h5 takes /images from the raw file {names[-1]}, which does not exist: copy it again")


def virtual(path, parts, shape=(N, *SHAPE), **options):
    """A virtual data set of (where, file, data set, shape of that, which part of that)."""
    layout = h5py.VirtualLayout(shape, np.uint8)
    for where, file, name, source_shape, part in parts:
        layout[where] = h5py.VirtualSource(file, name, source_shape)[part]
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("images", layout, **options)
        file["labels"] = content()[1]
    return path


ALL = np.s_[:]
FULL = (N, *SHAPE)


@pytest.mark.parametrize(
    ("parts", "missing"),
    [
        ([(np.s_[:600], "s.h5", "images", FULL, np.s_[:600])], "600:1000"),
        ([(np.s_[100:], "s.h5", "images", FULL, np.s_[100:])], "0:100"),
        ([(np.s_[::2], "s.h5", "images", FULL, np.s_[::2])], "1:1000"),
        ([(np.s_[:, :19], "s.h5", "images", FULL, np.s_[:, :19])], "0:1000"),
        ([(np.s_[:500], "s.h5", "images", FULL, np.s_[:500])] * 2, "500:1000"),  # as many as it takes, but the same
    ],
)
@pytest.mark.parametrize("fillvalue", [0, 200])
def test_a_virtual_data_set_with_a_part_that_no_source_covers(tmp_path, parts, missing, fillvalue):
    write(tmp_path / "s.h5")
    path = virtual(tmp_path / "a.h5", parts, fillvalue=fillvalue)
    refused(path, rf"a\.h5 has no source for all of /images\[{missing}\], which would be read as {fillvalue}")


@pytest.mark.parametrize(
    "parts",
    [
        [(ALL, "s.h5", "images", FULL, ALL)],
        [(ALL, "s.h5", "images", FULL, ALL), (np.s_[:9], "s.h5", "images", FULL, np.s_[:9])],
        [(np.s_[1::2], "s.h5", "images", FULL, np.s_[1::2]), (np.s_[::2], "s.h5", "images", FULL, np.s_[::2])],
        [(np.s_[:, 5:], "s.h5", "images", FULL, np.s_[:, 5:]), (np.s_[:, :9], "s.h5", "images", FULL, np.s_[:, :9])],
    ],
)
def test_a_virtual_data_set_that_is_whole(tmp_path, parts):
    write(tmp_path / "s.h5")
    path = virtual(tmp_path / "a.h5", parts)
    check(open_hdf5(path))
    with pytest.raises(ValueError, match=r"'mmap' cannot read .*a\.h5 are virtual, put together from other data sets"):
        open_hdf5(path, storage="mmap")
    pickled = pickle.dumps(open_hdf5(path))
    write(tmp_path / "s.h5", content()[0][::-1])
    with pytest.raises(ValueError, match=r"s\.h5 was written again"):
        pickle.loads(pickled)


def test_a_virtual_data_set_behind_a_link_and_of_virtual_ones(tmp_path):
    (tmp_path / "far").mkdir()
    write(tmp_path / "far" / "s.h5")
    virtual(tmp_path / "far" / "v.h5", [(ALL, "s.h5", "images", FULL, ALL)])
    virtual(tmp_path / "a.h5", [(ALL, "far/v.h5", "images", FULL, ALL)])
    check(open_hdf5(tmp_path / "a.h5"))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["images"] = h5py.ExternalLink("far/v.h5", "/images")
        file["labels"] = content()[1]
    check(open_hdf5(tmp_path / "b.h5"))
    (tmp_path / "far" / "s.h5").rename(tmp_path / "far" / "elsewhere.h5")
    for name in ("a.h5", "b.h5"):
        refused(tmp_path / name, r"far/v\.h5 takes /images from s\.h5, which does not exist")


def test_sources_that_are_not_what_they_were(tmp_path):
    images, _ = content()
    path = virtual(tmp_path / "a.h5", [(ALL, "s.h5", "images", FULL, ALL)])
    write(tmp_path / "s.h5", images[:990], content()[1][:990])
    refused(
        path, r"s\.h5 holds /images of shape \(990, 20, 10, 3\), but .*a\.h5 takes a part of it that ends at \(1000, 20"
    )
    write(tmp_path / "s.h5", images.astype(np.float32) / 255)
    refused(path, r"a\.h5 has /images as uint8, but takes it from float32 in .*s\.h5: HDF5 would cut the values off")
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file.create_dataset("images", FULL, np.uint8)
    refused(path, r"s\.h5 holds no data in /images: they were never written")
    path = virtual(tmp_path / "b.h5", [(ALL, "s.h5", "images", (2000, *SHAPE), np.s_[1000:])])
    write(tmp_path / "s.h5")
    refused(path, r"s\.h5 holds /images of shape \(1000, .* takes a part of it that ends at \(2000, 20, 10, 3\)")


def test_a_virtual_data_set_without_end(tmp_path):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file.create_dataset("images", data=content()[0], maxshape=(None, *SHAPE))
    layout = h5py.VirtualLayout(FULL, np.uint8, maxshape=(None, *SHAPE))
    source = h5py.VirtualSource("s.h5", "images", FULL, maxshape=(None, *SHAPE))
    layout[0 : h5py.h5s.UNLIMITED] = source[0 : h5py.h5s.UNLIMITED]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("images", layout)
        file["labels"] = content()[1]
    refused(tmp_path / "a.h5", r"a\.h5 takes /images from s\.h5 without a fixed end")


PREFIXES = """
from pathlib import Path
from test_user_hdf5_places import ALL, FULL, check, content, open_hdf5, virtual, with_raw_file, write
check(open_hdf5(with_raw_file(Path("a.h5"), content()[0])))
assert Path("elsewhere/pixels.raw").exists()
write(Path("elsewhere/s.h5"))
check(open_hdf5(virtual(Path("b.h5"), [(ALL, "s.h5", "images", FULL, ALL)])))
"""


def test_the_places_that_hdf5_is_told_of(here):
    """In a process of its own, as HDF5 looks at its environment once."""
    (here / "elsewhere").mkdir()
    places = {"HDF5_EXTFILE_PREFIX": str(here / "elsewhere"), "HDF5_VDS_PREFIX": str(here / "elsewhere")}
    modules = {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    subprocess.run([sys.executable, "-c", PREFIXES], check=True, env=os.environ | places | modules, timeout=60)


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize(("driver", "name"), [("family", "a%d"), ("split", "a")])
def test_a_file_in_several_parts(tmp_path, libver, driver, name):
    options = {"memb_size": 1 << 20} if driver == "family" else {}
    with h5py.File(tmp_path / name, "w", driver=driver, libver=libver, **options) as file:
        file["images"], file["labels"] = content()
    first = tmp_path / ("a0" if driver == "family" else "a-m.h5")
    refused(first, "is one part of an HDF5 file in several parts .*; join them to one file")


# -- the same images twice ------------------------------------------------------------------------------------------------


def test_the_same_file_twice(here):
    path, other = write(here / "a.h5"), write(here / "b.h5")
    os.link(path, here / "hard.h5")
    (here / "symbolic.h5").symlink_to("a.h5")
    with h5py.File(here / "link.h5", "w") as file:
        for name in ("images", "labels"):
            file[name] = h5py.ExternalLink("a.h5", f"/{name}")
    with pytest.raises(ValueError, match=r"a\.h5 is named twice, .*name every file once"):
        open_hdf5([path, other, path])
    for again in ("a.h5", here / "hard.h5", here / "symbolic.h5", here / "link.h5"):
        with pytest.raises(ValueError, match=r"a\.h5 and .*\.h5 are the same samples, .*name every file once"):
            open_hdf5([path, other, again])
    assert len(open_hdf5([path, other])) == 2 * N  # equal content is not the same file


def test_a_virtual_data_set_beside_its_source(here):
    write(here / "s.h5")
    virtual(here / "v.h5", [(ALL, "s.h5", "images", FULL, ALL)])
    virtual(here / "w.h5", [(ALL, "v.h5", "images", FULL, ALL)])
    for names in (["s.h5", "v.h5"], ["v.h5", "s.h5"], ["w.h5", "s.h5"], ["v.h5", "w.h5"]):
        with pytest.raises(ValueError, match=r"are the same samples, .*name every file once"):
            open_hdf5(names)
    half = {"shape": (500, *SHAPE)}
    for name, part in (("1.h5", np.s_[:500]), ("2.h5", np.s_[500:])):
        virtual(here / name, [(ALL, "s.h5", "images", FULL, part)], **half)
        with h5py.File(here / name, "a") as file:
            del file["labels"]
            file["labels"] = content()[1][part]
    check(open_hdf5(["1.h5", "2.h5"]))
    virtual(here / "self.h5", [(ALL, ".", "images", FULL, ALL)])
    refused(here / "self.h5", r"self\.h5 holds a virtual data set that takes its data from itself")


def test_the_odd_file_is_named(tmp_path):
    paths = [write(tmp_path / f"{i}.h5", content(5, (4, 4) if i == 0 else SHAPE)[0], np.arange(5)) for i in range(4)]
    with pytest.raises(
        ValueError, match=r"shape \(20, 10, 3\) are in .*1\.h5 and others, and images in .*0\.h5 of shape \(4, 4, 1\)$"
    ):
        open_hdf5(paths)


def test_compact_images_and_names_from_the_root(tmp_path):
    images, labels = content(10, (5, 5))
    compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    compact.set_layout(h5py.h5d.COMPACT)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        space = h5py.h5s.create_simple(images.shape)
        h5py.Dataset(h5py.h5d.create(file.id, b"images", h5py.h5t.STD_U8LE, space, compact))[:] = images
        file["labels"] = labels
    dataset = open_hdf5(tmp_path / "a.h5", "/images", "/labels")
    np.testing.assert_array_equal(dataset.take(np.arange(10))[..., 0], images)
    with pytest.raises(
        ValueError, match=r"'mmap' cannot read .*a\.h5 are in the header of the file \(compact\); write"
    ):
        open_hdf5(tmp_path / "a.h5", storage="mmap")
    with pytest.raises(ValueError, match=r"a\.h5 holds /images as uint8 \(10, 5, 5\); integers, .* are needed$"):
        open_hdf5(tmp_path / "a.h5", labels="/images")
    with pytest.raises(ValueError, match=r"a\.h5 has no dataset /x; it has images, labels"):
        open_hdf5(tmp_path / "a.h5", "/x")


# -- axes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"chunks": (64, 3, 20, 10)}, {"chunks": (7, 2, 9, 10), "compression": "gzip"}])
def test_channels_first(tmp_path, options):
    images, _ = content()
    path = write(tmp_path / "a.h5", np.ascontiguousarray(np.moveaxis(images, 3, 1)), **options)
    dataset = open_hdf5(path)
    assert dataset.shape == SHAPE
    check(dataset)
    assert dataset.fingerprint == open_hdf5(write(tmp_path / "b.h5")).fingerprint
    check(open_hdf5(path, channels="first"))
    with pytest.raises(ValueError, match=r"'mmap' cannot read .*a\.h5 are channels-first; write them as shards"):
        open_hdf5(path, storage="mmap")


@pytest.mark.parametrize("storage", STORAGES)
def test_one_channel_first_is_read_in_place(tmp_path, storage):
    images = content()[0][..., :1]
    dataset = open_hdf5(write(tmp_path / "a.h5", images.reshape(N, 1, 20, 10)), storage=storage)
    assert dataset.shape == (20, 10, 1)
    np.testing.assert_array_equal(dataset.take(np.arange(N)), images)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 64, 13), (64, 64, 13)),
        ((4, 4, 3), (4, 4, 3)),
        ((3, 32, 32), (32, 32, 3)),
        ((4, 5, 6), (5, 6, 4)),
        ((3, 32, 3), None),
        ((2, 32, 3), None),
        ((13, 64, 64), None),
        ((1, 1, 1), None),
    ],
)
def test_which_axis_is_the_channels(tmp_path, shape, expected):
    path = write(tmp_path / "a.h5", content(20, shape)[0], np.arange(20))
    if expected is None:
        refused(
            path,
            rf"a\.h5 holds /images of shape \(20, {', '.join(map(str, shape))}\), which does not tell .* say channels=",
        )
    else:
        assert open_hdf5(path).shape == expected
    assert open_hdf5(path, channels="last").shape == shape
    assert open_hdf5(path, channels="first").shape == (*shape[1:], shape[0])
    with pytest.raises(ValueError, match="channels is 'middle'; choose 'auto', 'first' or 'last'"):
        open_hdf5(path, channels="middle")


# -- types ----------------------------------------------------------------------------------------------------------------


def test_labels_of_other_kinds(tmp_path):
    _, labels = content()
    for number, one_hot in enumerate((np.eye(5)[labels], np.eye(5, dtype=bool)[labels])):
        check(open_hdf5(write(tmp_path / f"{number}.h5", labels=one_hot)))
    names = np.array([b"ant", b"bee", b"cat", b"dog", b"eel"])[labels]
    for values in (names, names.astype(object)):
        path = write(tmp_path / "bytes.h5", labels=values)
        refused(
            path, r"bytes\.h5 holds /labels as .* number the classes, as in names, labels = numpy\.unique\(labels, ret"
        )
    refused(write(tmp_path / "soft.h5", labels=np.full((N, 5), 0.2)), r"these are not one-hot")
    refused(write(tmp_path / "float.h5", labels=labels.astype(float)), r"convert them, as in labels\.astype\(int\)")
    refused(
        write(tmp_path / "scalar.h5", labels=3),
        r"holds /labels as int64 \(\); integers, one for each of the 1000 images",
    )


def test_images_of_other_kinds(tmp_path):
    labels = content()[1]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["labels"] = labels
        file["empty"] = h5py.Empty("u1")
        file["scalar"] = np.uint8(3)
        file["references"] = np.full(N, file["labels"].ref, h5py.ref_dtype)
        file.create_dataset("jpegs", N, h5py.vlen_dtype(np.uint8))
        file["wide"] = content()[0].astype(">u2")
        file["type"] = np.dtype(np.uint8)
    for name, message in {
        "empty": r"holds /empty as uint8 None; uint8 \(N, H, W, C\)",
        "scalar": r"holds /scalar as uint8 \(\); uint8 \(N, H, W, C\)",
        "references": r"holds /references as references \(1000,\)",
        "jpegs": r"holds /jpegs as arrays of various lengths",
        "wide": r"holds /wide as >u2 \(1000, 20, 10, 3\)",
        "type": r"has no dataset /type; it has empty, jpegs",
    }.items():
        with pytest.raises(ValueError, match=rf"a\.h5 {message}"):
            open_hdf5(tmp_path / "a.h5", name)


def test_a_type_with_a_name_or_of_another_byte_order_or_precision(tmp_path):
    images, labels = content()
    narrow = h5py.h5t.STD_U8LE.copy()
    narrow.set_precision(6)
    narrow.set_offset(2)  # HDF5 shifts such values; the bytes in the file are not the pixels
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["type"] = np.dtype(np.uint8)
        file.create_dataset("named", images.shape, file["type"])[:] = images
        for name, kind in {"big": h5py.h5t.STD_U8BE, "narrow": narrow}.items():
            space = h5py.h5s.create_simple(images.shape)
            h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space))[:] = (
                images // 4 if name == "narrow" else images
            )
        file["labels"] = labels
    for storage in STORAGES:
        check(open_hdf5(tmp_path / "a.h5", "named", storage=storage))
        check(open_hdf5(tmp_path / "a.h5", "big", storage=storage))
    np.testing.assert_array_equal(open_hdf5(tmp_path / "a.h5", "narrow").take(np.arange(N)), images // 4)


def test_a_filter_that_is_not_installed(tmp_path, monkeypatch):
    path = write(tmp_path / "a.h5", chunks=(100, *SHAPE), compression="gzip")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: False)
    refused(path, r"a\.h5 holds /images compressed by filter 1 \(deflate\), .*hdf5plugin")


# -- images that were never written, of which the file keeps no account ------------------------------------------------------


def test_space_without_images(tmp_path):
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_layout(h5py.h5d.CONTIGUOUS)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        h5py.h5d.create(file.id, b"images", h5py.h5t.STD_U8LE, h5py.h5s.create_simple(FULL), early)
        file["labels"] = content()[1]
    refused(tmp_path / "a.h5", r"the 1000 images from a\.h5 sample 0 .* on hold nothing but the fill value 0")


@pytest.mark.parametrize("options", [{}, {"chunks": (100, *SHAPE)}])
def test_a_few_images_that_were_never_written(tmp_path, options):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("images", FULL, np.uint8, fillvalue=255, **options)
        file["images"][:950] = content()[0][:950]
        file["labels"] = content()[1]
    with pytest.warns(
        UserWarning, match=r"50 of 1000 images hold nothing but the fill value, the first is a\.h5 sample 950"
    ):
        open_hdf5(tmp_path / "a.h5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_hdf5(write(tmp_path / "b.h5"))


# -- a file that somebody has open -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("locking", [None, True, False, "best-effort"])
def test_a_file_that_this_process_reads_already(tmp_path, make_dataset, locking):
    with h5py.File(write(tmp_path / "a.h5"), "r", locking=locking) as held:
        check(open_hdf5(tmp_path / "a.h5"))
        assert held["labels"][0] == 0
    make_dataset(10)
    with h5py.File(tmp_path / "train" / "train-00000-of-00001.h5", "r", locking=locking):
        ShardedDataset(tmp_path).verify()


@pytest.mark.parametrize("locking", [None, False])
@pytest.mark.parametrize("mode", ["r+", "w"])
def test_a_file_that_this_process_writes(tmp_path, make_dataset, mode, locking):
    """What it wrote last may not be in the file yet; a copy would be of no help."""
    with h5py.File(tmp_path / "new.h5", mode="w") as file:
        file["images"], file["labels"] = content()
    with h5py.File(tmp_path / "new.h5", mode, locking=locking) as file:
        if mode == "w":
            file["images"], file["labels"] = content()
        refused(tmp_path / "new.h5", r"this program has .*new\.h5 open for writing, .*: close that h5py\.File first$")
        (tmp_path / "other.h5").symlink_to("new.h5")
        refused(tmp_path / "other.h5", "open for writing")
    check(open_hdf5(tmp_path / "new.h5"))
    make_dataset(10)
    with (
        h5py.File(tmp_path / "train" / "train-00000-of-00001.h5", "r+", locking=locking),
        pytest.raises(ValueError, match="open for writing"),
    ):
        ShardedDataset(tmp_path)


def test_a_file_that_another_program_writes(tmp_path):
    script = (
        "import h5py, os, sys; f = h5py.File(sys.argv[1], 'w', libver='latest'); f['x'] = 1; f.flush(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.h5")], check=True, timeout=60)
    refused(tmp_path / "a.h5", r"a\.h5 is being written by another program, or that program was killed; .*h5clear -s")


def test_what_is_no_file(tmp_path, monkeypatch):
    refused(tmp_path, "is a directory; name the HDF5 files in it")
    path = write(tmp_path / "a.h5")

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(h5py, "File", forbidden)  # root may read all files
    refused(path, r"a\.h5 may not be read by this user; change its permissions")
