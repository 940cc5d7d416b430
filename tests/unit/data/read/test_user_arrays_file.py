"""Arrays in files that somebody else wrote: where they lie, what they hold, and what is refused."""

import h5py
import numpy as np
import pytest

from hvdlocal.data.format.extent import FileReader, Unmappable, open_reader
from hvdlocal.data.read.user_arrays_file import inspect_arrays

X = np.random.default_rng(0).normal(size=(50, 3, 5)).astype(np.float32)
Y = np.arange(50.0)

LAYOUTS = {
    "contiguous": {},
    "chunked": {"chunks": (7, 2, 5)},
    "gzip": {"chunks": (8, 3, 5), "compression": "gzip"},
    "lzf, shuffle": {"chunks": (50, 3, 5), "compression": "lzf", "shuffle": True},
    "fletcher32": {"chunks": (1, 3, 5), "fletcher32": True},
    "growing": {"chunks": True, "maxshape": (None, 3, 5)},
    "scaled": {"chunks": (9, 1, 1), "compression": "gzip", "compression_opts": 9, "shuffle": True, "fletcher32": True},
}


def content(found):
    """The numbers of an array through the reader of its extent."""
    extent = found.extent
    buffer = np.empty(extent.data_bytes, np.uint8)
    reader = open_reader(extent)
    middle = (len(extent.unit_bounds) - 1) // 2
    cut = int(extent.unit_bounds[middle])
    reader.read(middle, len(extent.unit_bounds) - 1, buffer[cut:].data)
    if middle:
        reader.read(0, middle, buffer[:cut].data)  # backwards
    reader.close()
    return buffer.view(found.dtype).reshape(found.shape)


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Some units in a small file."""
    for module in ("hdf5_inspection", "npz_file"):
        for name in ("READ_BYTES", "BLOCK_BYTES"):
            monkeypatch.setattr(f"hvdlocal.data.read.{module}.{name}", 256)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mine.h5"


def hdf5(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "u1", ">i8", "?"])
def test_hdf5_of_any_layout(path, layout, dtype):
    x = (100 * X).astype(dtype)
    with h5py.File(path, "w") as file:
        file.create_dataset("group/x", data=x, **layout)
        file["y"] = Y
    found = inspect_arrays(path, ["group/x", "y"])
    assert (found.num_samples, found.arrays[0].dtype) == (50, x.dtype.newbyteorder("<"))
    np.testing.assert_array_equal(content(found.arrays[0]), x)
    np.testing.assert_array_equal(content(found.arrays[1]), Y)
    as_it_lies = not layout and not (dtype[0] == ">" and x.dtype.itemsize > 1)
    assert isinstance(found.arrays[0].extent, Unmappable) != as_it_lies
    assert (len(found.arrays[0].extent.unit_bounds) > 2) == (layout.get("chunks") not in (True, (50, 3, 5)))


def test_numbers_of_an_enumeration(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("y", data=np.array([1, 2, 1]), dtype=h5py.enum_dtype({"a": 1, "b": 2}))
    np.testing.assert_array_equal(content(inspect_arrays(path, ["y"]).arrays[0]), [1, 2, 1])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "i2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz(tmp_path, save, dtype, order):
    x = np.array(100 * X, dtype, order=order)
    save(tmp_path / "mine.npz", x=x, y=Y)
    found = inspect_arrays(tmp_path / "mine.npz", ["x", "y"])
    np.testing.assert_array_equal(content(found.arrays[0]), x)
    np.testing.assert_array_equal(content(found.arrays[1]), Y)
    as_it_lies = save is np.savez and order == "C" and dtype != ">f4"
    assert isinstance(open_reader(found.arrays[0].extent), FileReader) == as_it_lies


def test_an_npz_file_is_known_by_its_content(tmp_path):
    with (tmp_path / "mine.h5").open("wb") as file:
        np.savez(file, x=X)
    np.testing.assert_array_equal(content(inspect_arrays(tmp_path / "mine.h5", ["x"]).arrays[0]), X)


RAGGED = np.array([np.zeros(2), np.zeros(3)], object)
WRONG = {
    "complex": (
        X.astype(complex),
        "x as complex numbers, where samples are numbers in a fixed shape: write them as two",
    ),
    "records": (np.zeros(3, "i4,f4"), "x as records of several fields, .*write each field as an array of its own"),
    "text": (np.array([b"ab", b"c"]), "x as text, .*numpy.unique"),
    "scalar": (np.float32(3), "x as a single value; the first axis of an array must count the samples"),
    "empty": (X[:0], r"x as an array of shape \(0, 3, 5\), which is empty"),
    "empty axis": (X[:, :0], r"x as an array of shape \(50, 0, 5\), which is empty"),
    "long double": (np.zeros(3, np.longdouble), "x as float128, which torch has not got: write it as float64"),
}


@pytest.mark.parametrize(("array", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("kind", ["h5", "npz"])
def test_what_are_no_samples(tmp_path, kind, array, message):
    path = tmp_path / f"mine.{kind}"
    hdf5(path, x=array) if kind == "h5" else np.savez(path, x=array)
    with pytest.raises(ValueError, match=f"mine.{kind} holds {message}"):
        inspect_arrays(path, ["x"])


def test_arrays_of_various_lengths(tmp_path, path):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (2,), h5py.vlen_dtype(np.float32))
        file.create_dataset("s", data=["a", "b"])
        file.create_dataset("r", (2,), h5py.ref_dtype)
        file.create_dataset("n", data=h5py.Empty("f4"))
    for name, what in (("x", "arrays of various lengths"), ("s", "text"), ("r", "references"), ("n", "a single value")):
        with pytest.raises(ValueError, match=f"mine.h5 holds {name} as {what}"):
            inspect_arrays(path, [name])
    np.savez(tmp_path / "a.npz", x=RAGGED, u=np.array(["a"]), d=np.array(["2026-11-28"], "M8[D]"))
    for name, what in (("x", "arrays of various lengths or objects"), ("u", "text"), ("d", "dates")):
        with pytest.raises(ValueError, match=f"a.npz holds {name} as {what}"):
            inspect_arrays(tmp_path / "a.npz", [name])


def test_arrays_of_different_length(tmp_path, path):
    hdf5(path, x=X, y=Y[1:])
    np.savez(tmp_path / "a.npz", x=X, y=Y[1:])
    for file in (path, tmp_path / "a.npz"):
        with pytest.raises(ValueError, match="holds 50 samples of x but 49 of y; write one of each"):
            inspect_arrays(file, ["x", "y"])


def test_what_is_missing(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=r"mine.h5 does not exist; name an HDF5 file of x, y"):
        inspect_arrays(path, ["x", "y"])
    hdf5(path, **{"fields/x": X, "y": Y})
    with pytest.raises(ValueError, match=r"mine.h5 has no dataset /z; it has fields/x, y"):
        inspect_arrays(path, ["z"])
    with pytest.raises(ValueError, match=r"mine.h5 has a group /fields, which holds x: name a data set in it"):
        inspect_arrays(path, ["fields"])
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    with pytest.raises(ValueError, match=r"a.npz has no array z; it has x, y"):
        inspect_arrays(tmp_path / "a.npz", ["z"])
    path.write_text("x,y\n")
    with pytest.raises(ValueError, match=r"mine.h5 cannot be opened as HDF5"):
        inspect_arrays(path, ["x"])
    with pytest.raises(ValueError, match="is a directory; name the HDF5 files in it"):
        inspect_arrays(tmp_path, ["x"])


def test_what_was_never_written(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (50, 3), "f4", chunks=(10, 3))[:10] = 1
        file["y"] = h5py.ExternalLink("gone.h5", "/y")
    with pytest.raises(ValueError, match=r"holds 1 of the 5 chunks of /x: the others were never written"):
        inspect_arrays(path, ["x"])
    with pytest.raises(
        ValueError, match=r"has a link /y to /y of gone.h5, where no data set can be opened: copy it too"
    ):
        inspect_arrays(path, ["y"])


def test_a_virtual_data_set(tmp_path, path):
    layout = h5py.VirtualLayout((50, 3, 5), "f4")
    for number in range(2):
        hdf5(tmp_path / f"{number}.h5", x=X[25 * number :][:25])
        layout[25 * number : 25 * number + 25] = h5py.VirtualSource(f"{number}.h5", "x", (25, 3, 5))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("x", layout)
    np.testing.assert_array_equal(content(inspect_arrays(path, ["x"]).arrays[0]), X)
    (tmp_path / "1.h5").unlink()
    with pytest.raises(ValueError, match=r"takes /x from 1.h5, which does not exist: copy it too"):
        inspect_arrays(path, ["x"])


def test_a_damaged_npz_file(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).normal(size=(10_000, 5)))
    whole = path.read_bytes()
    path.write_bytes(whole[:200_000] + b"\xff" * 40 + whole[200_040:])
    with pytest.raises(ValueError, match=r"a.npz: bytes .* of x.npy cannot be unpacked .*copy the file again"):
        content(inspect_arrays(path, ["x"]).arrays[0])
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"a.npz cannot be read as .npz .*; copy or write it again"):
        inspect_arrays(path, ["x"])
