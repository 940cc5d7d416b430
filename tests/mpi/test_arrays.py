"""Named arrays over ranks: the same files from any number of writers, one copy per node, every sample once."""

import numpy as np
import pytest

from hvdlocal import ArrayWriter, Loader, ShardedDataset
from hvdlocal.data.permutations import pre_shuffle

N = 101
ARRAYS = {"x": np.arange(3 * N, dtype=np.float32).reshape(N, 3), "mask": np.arange(N) % 3 == 0, "y": np.arange(N) ** 2}
ROLES = {"inputs": ["x", "mask"], "targets": ["y"]}


def test_ranks_write_together_what_one_process_writes(comm, place, tmp_path):
    ArrayWriter(place / "arrays", "train", **ROLES, num_shards=5, communicator=comm).write(ARRAYS)
    ArrayWriter(tmp_path, "train", **ROLES, num_shards=5).write(ARRAYS)
    written = sorted((place / "arrays" / "train").iterdir())
    assert [path.name for path in written] == sorted(path.name for path in (tmp_path / "train").iterdir())
    for path in written:
        assert path.read_bytes() == (tmp_path / "train" / path.name).read_bytes()


@pytest.mark.parametrize("storage", ["ram", "mmap", "stream"])
def test_every_sample_meets_one_rank_in_each_epoch(comm, place, storage):
    ArrayWriter(place / storage, "train", **ROLES, num_shards=3, communicator=comm).write(ARRAYS)
    with ShardedDataset(place / storage, storage=storage, communicator=comm) as dataset:
        np.testing.assert_array_equal(dataset.index, pre_shuffle(0, N))
        loader = Loader(dataset, 4, rank=comm.rank, num_workers=comm.size, tail="partial")
        for _ in range(2):
            mine = []
            for inputs, targets in loader:
                numbers = inputs["x"][:, 0].long() // 3
                assert (numbers**2 == targets).all()
                assert (inputs["mask"] == (numbers % 3 == 0)).all()
                mine += numbers.tolist()
            everyone = comm.gather(mine, "test.samples")
            assert sorted(number for one in everyone for number in one) == list(range(N))


def test_a_number_that_is_not_finite_is_an_error_of_all_ranks(comm, place):
    x = np.where(ARRAYS["x"] == 7, np.nan, ARRAYS["x"])
    with pytest.raises(ValueError, match="x holds 1 NaN and 0 infinite numbers"):
        ArrayWriter(place / "nan", "train", **ROLES, communicator=comm).write(ARRAYS | {"x": x})
