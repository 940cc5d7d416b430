"""What counts islands, and how their ranks are numbered, after an island has left."""

from types import SimpleNamespace

import pytest

from hvdlocal.averaging.replica import ReplicaOptimizer
from hvdlocal.training.survivors import Survivors


@pytest.mark.parametrize(
    ("min_workers", "told"),
    [(2, None), (3, "4 ranks are left of 6, in 2 islands, fewer than min_workers=3")],
)
def test_min_workers_counts_islands(min_workers, told):
    left = SimpleNamespace(size=4, num_islands=2, job_size=6, island=SimpleNamespace(size=2))
    survivors = SimpleNamespace(_communicator=left, _min_workers=min_workers)
    assert Survivors.too_few.fget(survivors) == told


def test_a_state_numbers_the_ranks_of_an_island_as_a_later_start_will():
    """Of three islands of two the first one has left; rank 4 of the job is rank 2 then, and its island the ranks 2 and 3."""
    left = SimpleNamespace(rank=2, job_ranks=(2, 3, 4, 5), island=SimpleNamespace(job_ranks=(4, 5)))
    optimizer = SimpleNamespace(communicator=left, _averages_parameters=True)
    assert ReplicaOptimizer._ranks_of_worker.fget(optimizer) == [2, 3]
