"""A user's own arrays on ranks: one copy in memory, each sample once, and one error for all."""

import h5py
import numpy as np
import pytest

from hvdlocal.communicator.agreement import SetupError
from hvdlocal.data import Loader, open_arrays
from hvdlocal.data.read.selected import hold_out

N = 60
X = np.arange(5 * N, dtype=np.float32).reshape(N, 5)


@pytest.fixture
def path(comm, place):
    if comm.rank == 0:
        with h5py.File(place / "mine.h5", "w") as file:
            file.create_dataset("x", data=X, chunks=(7, 3), compression="gzip")
            file["y"] = np.arange(N)
            file["short"] = np.arange(N - 1)
    comm.barrier("written")
    return place / "mine.h5"


@pytest.mark.parametrize("share", ["node", "job"])
def test_each_sample_comes_once(comm, path, share):
    whole = open_arrays(path, "x", "y", communicator=comm, share=share)
    train, test = hold_out(whole, 0.1)
    mine = []
    for inputs, targets in Loader(train, 2, rank=comm.rank, num_workers=comm.size, tail="partial"):
        np.testing.assert_array_equal(inputs.numpy(), X[targets.numpy()])
        mine += targets.tolist()
    everyone = [number for part in comm.gather(mine, "mine") for number in part]
    assert sorted([*everyone, *test.take(np.arange(6))["y"].tolist()]) == list(range(N))
    assert len(set(comm.gather(train.fingerprint, "fingerprints"))) == 1
    assert comm.size == 1 or whole._opened[0].region is not None
    train.close()


def test_a_mistake_is_one_error_on_all_ranks(comm, path):
    with pytest.raises((ValueError, SetupError), match="holds 60 samples of x but 59 of short"):
        open_arrays(path, "x", "short", communicator=comm)
