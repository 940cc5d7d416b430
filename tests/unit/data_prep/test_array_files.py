"""Arrays as a writer reads them: any rows, what is not finite, and unpacking once."""

import h5py
import numpy as np
import pytest

from data_prep.array_files import ArrayFiles
from hvdlocal.communicator import SingleProcess
from hvdlocal.data.read.named_arrays import NamedArrays

X = np.random.default_rng(0).normal(size=(60, 4, 3)).astype(np.float32)
Y = np.arange(60)


@pytest.fixture
def opened(tmp_path):
    """Opens arrays x and y of files, and closes them at the end."""
    files = []

    def open_files(*paths, inputs="x", targets="y"):
        files.append(ArrayFiles(NamedArrays.of(paths, inputs, targets), tmp_path / "scratch", SingleProcess()))
        return files[-1]

    yield open_files
    for file in files:
        file.close()
    assert not (tmp_path / "scratch").exists()


def write(path, x=X, y=Y, **options):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=x, **options)
        file["y"] = y
    return path


def test_any_rows_of_several_files(tmp_path, opened):
    paths = [
        write(tmp_path / "a.h5", X[:10], Y[:10]),
        write(tmp_path / "b.h5", X[10:40].astype(">f4"), Y[10:40], chunks=(7, 2, 3), compression="gzip"),
        tmp_path / "c.npz",
    ]
    np.savez_compressed(paths[2], x=X[40:], y=Y[40:])
    files = opened(*paths)
    assert len(files) == 60
    chosen = np.random.default_rng(1).permutation(60)[:41]
    for name, whole in (("x", X), ("y", Y)):
        rows = files.rows(name, chosen)
        assert (rows.dtype, rows.shape) == (whole.dtype, (41, *whole.shape[1:]))
        np.testing.assert_array_equal(rows[:], whole[chosen])
        np.testing.assert_array_equal(rows[3:9], whole[chosen[3:9]])
        np.testing.assert_array_equal(rows[np.array([40, 0, 7])], whole[chosen[[40, 0, 7]]])
        assert len(rows[5:5]) == 0
    assert files.packed == f"{paths[1]}: x is chunked or compressed"
    assert files.nonfinite == {}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_a_flipped_bit_in_an_npz_file(tmp_path, opened, save, dtype):
    path = tmp_path / "a.npz"
    x = np.random.default_rng(0).normal(size=(60, 40, 3))  # longer than what is read with the header
    save(path, x=x.astype(dtype), y=Y)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"y.npy") - 100] ^= 1  # in the last numbers of x
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"a.npz is damaged \(.+\); copy the file again"):
        opened(path)


def test_the_identity_is_that_of_the_content(tmp_path, opened, monkeypatch):
    monkeypatch.setattr("data_prep.array_files.READ_BYTES", 256)
    identity = opened(write(tmp_path / "a.h5")).identity
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    assert opened(write(tmp_path / "b.h5", chunks=(9, 4, 1), shuffle=True)).identity == identity
    assert opened(tmp_path / "a.npz").identity == identity
    assert opened(write(tmp_path / "c.h5", X[:9], Y[:9]), write(tmp_path / "d.h5", X[9:], Y[9:])).identity == identity
    other = X.copy()
    other[59, 3, 2] += 1
    assert opened(write(tmp_path / "e.h5", other)).identity != identity
    assert opened(write(tmp_path / "f.h5", X.reshape(60, 3, 4))).identity != identity
    assert opened(write(tmp_path / "g.h5", y=Y.astype(np.int32))).identity != identity


def test_what_is_not_finite_is_counted(tmp_path, opened, monkeypatch):
    monkeypatch.setattr("data_prep.array_files.READ_BYTES", 256)
    x, y = X.copy(), Y.astype(np.float64)
    x[17, :2, 0] = np.nan
    x[55, 3, 2] = np.inf
    y[59] = -np.inf
    a, b = write(tmp_path / "a.h5", x[:10], y[:10]), write(tmp_path / "b.h5", x[10:], y[10:])
    assert opened(a, b).nonfinite == {
        "x": f"x holds 3 numbers that are not finite, in 2 samples, the first in sample 7 of {b}",
        "y": f"y holds 1 number that is not finite, in 1 sample, the first in sample 49 of {b}",
    }


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[10:].astype(np.float64), r"b.h5 holds x as float64 \(4, 3\) per sample, and .*a.h5 as float32 \(4, 3\)"),
        (
            X[10:, :3],
            r"b.h5 holds x as float32 \(3, 3\) per sample, and .*a.h5 as float32 \(4, 3\); bring all files to one",
        ),
        (X[11:], "b.h5 holds 49 samples of x but 50 of y"),
    ],
)
def test_files_that_differ(tmp_path, opened, x, message):
    with pytest.raises(ValueError, match=message):
        opened(write(tmp_path / "a.h5", X[:10], Y[:10]), write(tmp_path / "b.h5", x, Y[10:]))


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ("x", "x", "x is named 2 times in inputs x and targets x; name every array once"),
        ("x,y,/x", "z", "x is named 2 times in inputs x, y, x and targets z"),
        ("x", "", "inputs are x and targets missing; name at least one array of each"),
        ("x,", "y", "name at least one array of each"),
    ],
)
def test_names_that_do_not_go_together(tmp_path, opened, inputs, targets, message):
    with pytest.raises(ValueError, match=message):
        opened(write(tmp_path / "a.h5"), inputs=inputs, targets=targets)


def test_a_file_that_is_named_twice(tmp_path, opened):
    path = write(tmp_path / "a.h5")
    with pytest.raises(ValueError, match=r"a.h5 is named twice, so each of them would come twice"):
        opened(path, path)
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    (tmp_path / "b.npz").hardlink_to(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a.npz and .*b.npz are the same samples"):
        opened(tmp_path / "a.npz", tmp_path / "b.npz")


def test_what_a_killed_run_left_is_replaced(tmp_path, opened):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "0-0").write_bytes(b"\xff" * 10**6)
    files = opened(write(tmp_path / "a.h5", chunks=(7, 2, 3)))
    np.testing.assert_array_equal(files.rows("x", np.arange(60))[:], X)


@pytest.mark.parametrize("chunks", [(6, 4, 3), (60, 2, 1), (7, 3, 2), (13, 1, 3), (1, 4, 1)])
@pytest.mark.parametrize("held", [1, 100, 500, 1 << 20])
def test_every_chunk_is_unpacked_once_and_little_is_held(tmp_path, opened, monkeypatch, chunks, held):
    """As h5py chooses chunks by itself, they hold parts of many samples."""
    path = write(tmp_path / "a.h5", chunks=chunks, compression="gzip")
    read, seen = h5py.Dataset.read_direct, np.zeros(X.shape, int)

    def note(self, dest, source_sel=None, dest_sel=None):
        assert dest.nbytes <= max(held, 4 * np.prod(chunks))
        assert all(part.start % chunk == 0 for part, chunk in zip(source_sel, chunks, strict=True)), "whole chunks"
        seen[source_sel] += 1
        return read(self, dest, source_sel, dest_sel)

    monkeypatch.setattr(h5py.Dataset, "read_direct", note)
    monkeypatch.setattr("data_prep.unpacked.HELD_BYTES", held)
    rows = opened(path).rows("x", np.random.default_rng(0).permutation(60))
    for start in range(0, 60, 7):
        np.testing.assert_array_equal(rows[start : start + 7], X[rows.rows[start : start + 7]])
    assert (seen == 1).all()
