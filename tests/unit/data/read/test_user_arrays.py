"""A user's own arrays as samples: batches, fingerprints, storages, and what a log says of them."""

import pickle

import h5py
import numpy as np
import pytest
import torch

from hvdlocal.data import Loader, open_arrays
from hvdlocal.data.read.selected import hold_out

N = 90
X = np.random.default_rng(0).normal(size=(N, 4, 3)).astype(np.float32)
V = np.random.default_rng(1).integers(0, 9, (N, 2)).astype(np.int16)
Y = np.arange(N, dtype=np.float64)


def write(path, x=X, part=slice(None), **options):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=x[part], **options)
        file["more/v"], file["y"] = V[part], Y[part]
    return path


@pytest.mark.parametrize("storage", ["ram", "mmap", "stream"])
def test_batches_are_pairs_and_dicts_where_several_are_named(tmp_path, storage):
    data = open_arrays(write(tmp_path / "a.h5"), "x", "y", storage=storage)
    assert (data.kind, data.storage, len(data)) == ("arrays", storage, N)
    batches = list(Loader(data, 8, order="block", tail="partial"))
    rows, energies = (torch.cat(part) for part in zip(*batches, strict=True))
    assert (rows.dtype, energies.dtype) == (torch.float32, torch.float64)
    np.testing.assert_array_equal(rows.numpy(), X[energies.numpy().astype(int)])
    assert sorted(energies.tolist()) == Y.tolist()
    both = open_arrays(tmp_path / "a.h5", "x,more/v", "y", storage=storage)
    inputs, targets = next(iter(Loader(both, 8, order="global")))
    assert list(inputs) == ["x", "more/v"]
    np.testing.assert_array_equal(inputs["more/v"].numpy(), V[targets.numpy().astype(int)])


@pytest.mark.parametrize("storage", ["auto", "stream"])
@pytest.mark.parametrize(
    "options", [{"chunks": (7, 2, 3), "compression": "gzip"}, {"chunks": (1, 4, 3), "shuffle": True}]
)
def test_packed_arrays_in_memory_and_streamed(tmp_path, storage, options, monkeypatch):
    monkeypatch.setattr("hvdlocal.data.read.hdf5_inspection.READ_BYTES", 500)
    monkeypatch.setattr("hvdlocal.data.read.storage.base.BLOCK_BYTES", 500)
    data = open_arrays(write(tmp_path / "a.h5", **options), "x", "y", storage=storage)
    order = np.random.default_rng(2).permutation(N)
    taken = data.take(order)
    np.testing.assert_array_equal(taken["x"], X[order])
    np.testing.assert_array_equal(taken["y"], Y[order])
    assert len(data.block_starts) > 5
    seen = torch.cat([targets for _, targets in Loader(data, 8, order="block", tail="partial")])
    assert sorted(seen.tolist()) == Y.tolist()
    when = "every epoch" if storage == "stream" else "every start of a run"
    assert f"a.h5: x is chunked or compressed; that takes time at {when}, which python -m data_prep" in data.describe()


def test_chunks_that_are_too_large_to_be_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr("hvdlocal.data.read.hdf5_inspection.READ_BYTES", 500)
    monkeypatch.setattr("hvdlocal.data.read.storage.base.BLOCK_BYTES", 500)
    monkeypatch.setattr("hvdlocal.data.read.storage.BLOCK_BYTES", 500)
    path = write(tmp_path / "a.h5", chunks=(N, 1, 1))
    needed = 8 * (N * 4 * 3 * 4 + N * 8)  # y is one block, since what is left of it is less than one
    message = (
        "a.h5 can only be unpacked .* at a time, so that each process must hold .* to stream them, and it may hold"
    )
    with pytest.raises(ValueError, match=message):
        open_arrays(path, "x", "y", storage="stream", stream_bytes=N * 4 * 3 * 4)
    with open_arrays(path, "x", "y", storage="stream", stream_bytes=needed) as data:
        np.testing.assert_array_equal(data.take([5])["x"], X[5:6])


def test_streamed_samples_are_in_the_owners_order(tmp_path):
    data = open_arrays(write(tmp_path / "a.h5"), "x", "y", storage="stream")
    with pytest.raises(ValueError, match=r"do not lie in random order, .*python -m data_prep"):
        Loader(data, 8)


def test_what_lies_there_as_it_is_needs_no_remark(tmp_path):
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    for path in (write(tmp_path / "a.h5"), tmp_path / "a.npz"):
        assert "data_prep" not in open_arrays(path, "x", "y").describe()


def test_the_fingerprint_is_that_of_names_types_shapes_and_samples(tmp_path):
    whole = open_arrays(write(tmp_path / "a.h5"), "x", "y").fingerprint
    np.savez_compressed(tmp_path / "a.npz", x=X, y=Y)
    parts = [write(tmp_path / "b.h5", part=slice(31), chunks=(9, 4, 3)), write(tmp_path / "c.h5", part=slice(31, N))]
    big = write(tmp_path / "d.h5", X.astype(">f4"))
    for same in (tmp_path / "a.npz", parts, big):
        assert open_arrays(same, "x", "y").fingerprint == whole
    changed = X.copy()
    changed[89, 3, 2] += 1
    others = [
        open_arrays(write(tmp_path / "e.h5", changed), "x", "y"),
        open_arrays(write(tmp_path / "f.h5", X.astype(np.float64)), "x", "y"),
        open_arrays(write(tmp_path / "g.h5", part=slice(89)), "x", "y"),
        open_arrays(tmp_path / "a.h5", "y", "x"),
        open_arrays(tmp_path / "a.h5", "x", "more/v"),
    ]
    assert len({whole, *(other.fingerprint for other in others)}) == 6


def test_a_pickle(tmp_path):
    data = open_arrays(write(tmp_path / "a.h5", chunks=(9, 4, 3)), "x", "y")
    train, _ = hold_out(data, 0.1)
    packed = pickle.dumps(train)
    again = pickle.loads(packed)
    np.testing.assert_array_equal(again.take([3])["x"], train.take([3])["x"])
    assert again.fingerprint == train.fingerprint
    write(tmp_path / "a.h5", X + 1)
    with pytest.raises(ValueError, match=r"a.h5 was written again since this data set was opened"):
        pickle.loads(packed)


def test_a_holdout_of_samples_without_classes(tmp_path):
    train, test = hold_out(open_arrays(write(tmp_path / "a.h5"), "x", "y"), 0.1)
    assert (len(train), len(test)) == (81, 9)
    energies = [part.take(np.arange(len(part)))["y"] for part in (train, test)]
    assert sorted(np.concatenate(energies)) == Y.tolist()
    assert np.ptp(energies[1]) > 20
