"""Groups of ranks: their collectives need no rank outside, and all groups have theirs at the same time."""

import time

import pytest
import torch
from support.ranks import SIZE

import hvdlocal
from hvdlocal.communicator import CollectiveTimeoutError, SingleProcess, islands

SHAPES = [(SIZE // size, size) for size in range(1, SIZE + 1) if SIZE % size == 0]
"""Number of groups × ranks of a group: 2×2, 4×1 and 1×4 on four ranks."""


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def groups(comm, request):
    """Groups of consecutive ranks, and groups of those at the same place in them: this rank's communicators, and their ranks."""
    num, size = request.param
    inside = [list(range(i * size, (i + 1) * size)) for i in range(num)]
    across = [list(group) for group in zip(*inside, strict=True)]
    island, peers = comm.split(inside, "test.inside"), comm.split(across, "test.across")
    mine = next(group for group in inside if comm.rank in group)
    others = next(group for group in across if comm.rank in group)
    return island, peers, mine, others


def test_ranks_are_those_of_the_group_and_of_the_job(comm, groups):
    island, peers, mine, others = groups
    for group, ranks in ((island, mine), (peers, others)):
        assert (group.size, group.rank) == (len(ranks), ranks.index(comm.rank))
        assert group.job_ranks == tuple(ranks)
        assert (group.local_rank, group.local_size) == (comm.local_rank, comm.local_size)
        assert group.backend == comm.backend
        assert group.describe() == comm.describe()
        assert group.is_open


def test_sums_inside_and_across_run_at_the_same_time(comm, groups):
    island, peers, mine, others = groups
    inside = torch.arange(1000, dtype=torch.float32) * (comm.rank + 1)
    across = torch.full((1000,), comm.rank, dtype=torch.int64)
    everywhere = torch.full((3,), 2.0**comm.rank)
    waits = [
        island.start_sum_(inside, "test.sum"),
        peers.start_sum_(across, "test.peers"),
        comm.start_sum_(everywhere, "test.all"),
    ]
    for wait in waits:
        wait()
    assert torch.equal(inside, torch.arange(1000, dtype=torch.float32) * sum(rank + 1 for rank in mine))
    assert across.eq(sum(others)).all()
    assert everywhere.eq(2.0**comm.size - 1).all()


def test_a_sum_across_that_takes_long_holds_up_no_sum_inside(comm, groups):
    """The first island begins a sum across, which the others join only when it has summed inside: else nobody would go on."""
    island, peers, mine, others = groups
    if 1 in (island.size, peers.size):
        pytest.skip("one of the groups is all ranks")
    across, inside = torch.ones(1000), torch.ones(1000)
    first = mine[0] == 0
    wait = peers.start_sum_(across, "test.late") if first else None
    island.sum_(inside, "test.sum")
    comm.barrier("test.barrier")
    (wait or peers.start_sum_(across, "test.late"))()
    assert inside.eq(len(mine)).all()
    assert across.eq(len(others)).all()


def test_one_group_is_ahead_of_the_others(comm, groups):
    """Groups may call different numbers of collectives: none waits for a rank outside."""
    island, _, mine, _ = groups
    for _ in range(1 + mine[0]):
        tensor = torch.ones(1)
        island.sum_(tensor, "test.ahead")
        assert tensor == island.size
    comm.barrier("test.together")


def test_broadcast_and_gather_inside(comm, groups):
    for group, ranks in zip(groups[:2], groups[2:], strict=True):
        for root, rank in enumerate(ranks):
            tensor = torch.full((2, 3), comm.rank, dtype=torch.float64)
            group.broadcast_(tensor, "test.broadcast", root)
            assert tensor.eq(rank).all()
        assert group.gather("x" * comm.rank, "test.gather") == ["x" * rank for rank in ranks]
        group.barrier("test.barrier")


def test_slices_across_and_then_inside_are_the_sum_over_all(comm, groups):
    island, peers, _, _ = groups
    vector = torch.arange(5 * island.size, dtype=torch.float64) * (comm.rank + 1)
    slices = vector.split(5)
    island.sum_(vector, "test.inside")
    peers.sum_(slices[island.rank], "test.slice")
    for root, one in enumerate(slices):
        island.broadcast_(one, "test.slices", root)
    total = comm.size * (comm.size + 1) // 2
    assert torch.equal(vector, torch.arange(5 * island.size, dtype=torch.float64) * total)


def test_every_group_counts_its_own_traffic(comm, groups):
    island, peers, _, _ = groups
    before = comm.traffic.collectives, comm.traffic.bytes
    island.sum_(torch.zeros(10), "test.ten")
    peers.sum_(torch.zeros(3), "test.three")
    peers.broadcast_(torch.zeros(1), "test.one")
    assert (island.traffic.collectives, island.traffic.bytes) == ((1, 40) if island.size > 1 else (0, 0))
    assert (peers.traffic.collectives, peers.traffic.bytes) == ((2, 16) if peers.size > 1 else (0, 0))
    assert (comm.traffic.collectives, comm.traffic.bytes) == before


def test_groups_of_different_sizes(comm):
    if comm.size == 1:
        return
    last = comm.size - 1
    part = comm.split([[*range(last)], [last]], "test.uneven")
    tensor = torch.tensor([comm.rank + 1.0])
    part.sum_(tensor, "test.sum")
    assert tensor == (comm.size if comm.rank == last else last * (last + 1) // 2)
    assert part.gather(comm.rank, "test.gather") == list(part.job_ranks)


def test_a_deadline_names_the_collective_and_the_rank_of_the_job(comm, monkeypatch):
    """The last rank waits for the first, which is in another group of the job's collectives meanwhile."""
    if comm.size == 1:
        return
    last = comm.size - 1
    part = comm.split([[*range(1, last)], sorted({0, last})] if comm.size > 2 else [[0, 1]], "test.ends")
    if comm.rank == last:
        monkeypatch.setattr(part, "timeout_seconds", 0.2)
        with pytest.raises(CollectiveTimeoutError, match=rf"rank {last} of {comm.size} .* 'test.late'"):
            part.sum_(torch.ones(1), "test.late")
    elif comm.rank == 0:
        time.sleep(0.5)
        part.sum_(torch.ones(1), "test.late")
    comm.barrier("test.together")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda size: [[*range(size)], [0]], "do not divide"),
        (lambda size: [[*range(size + 1)]], "do not divide"),
        (lambda size: [], "do not divide"),
        (lambda size: [[*range(1, size)]], "do not divide"),
    ],
    ids=["twice", "too many", "none", "one is left out"],
)
def test_what_is_no_division_is_refused_on_all_ranks(comm, wrong, message):
    with pytest.raises(ValueError, match=message):
        comm.split(wrong(comm.size), "test.wrong")
    comm.barrier("test.together")


def test_different_or_unordered_groups_are_refused_on_all_ranks(comm):
    if comm.size == 1:
        return
    alone, together = [[rank] for rank in range(comm.size)], [[*range(comm.size)]]
    with pytest.raises(ValueError, match=rf"rank {comm.size - 1} gave the groups \[0\], .* give the same on all"):
        comm.split(alone if comm.rank == comm.size - 1 else together, "test.different")
    with pytest.raises(ValueError, match="in ascending order"):
        comm.split([[*reversed(range(comm.size))]], "test.reversed")
    part = comm.split(alone, "test.alone")
    with pytest.raises(ValueError, match="a group cannot be divided again"):
        part.split([[0]], "test.again")


def test_islands(comm, monkeypatch):
    monkeypatch.setattr(comm, "island", None)
    monkeypatch.setattr(comm, "islands", ())
    monkeypatch.setattr(comm, "peers", None)
    assert (comm.island_size, comm.num_islands) == (1, comm.size)
    for size in [n for n in range(2, comm.size + 1) if comm.size % n == 0]:
        islands.form_islands(comm, size)
        assert (comm.island_size, comm.num_islands) == (size, comm.size // size)
        first = comm.rank - comm.rank % size
        assert comm.island.job_ranks == tuple(range(first, first + size))
        assert comm.peers.job_ranks == tuple(range(comm.rank % size, comm.size, size))
        tensor = torch.tensor([1.0])
        comm.island.sum_(tensor, "test.island")
        comm.peers.sum_(tensor, "test.peers")
        assert tensor == comm.size
    if comm.size > 1:
        with pytest.raises(ValueError, match=f"island={comm.size + 1} does not divide {comm.size} ranks"):
            islands.form_islands(comm, comm.size + 1)
        with pytest.raises(ValueError, match=rf"island=1 on rank {comm.size - 1}, but 'node' on rank 0: give the same"):
            islands.form_islands(comm, 1 if comm.rank == comm.size - 1 else "node")


def test_another_island_is_refused(comm):
    assert hvdlocal.init(island=1) is comm
    with pytest.raises(ValueError, match=r"init\(island=2\): this process already uses island=1"):
        hvdlocal.init(island=2)
    with pytest.raises(ValueError, match=r"init\(island='node'\): this process already uses island=1"):
        hvdlocal.init(island="node")


def test_a_group_of_one_process_that_stands_for_several():
    alone = SingleProcess(6)
    part = alone.split([[0, 1, 2], [3, 4, 5]], "test.dry")
    assert isinstance(part, SingleProcess)
    assert (part.rank, part.size) == (0, 3)
    tensor = torch.ones(2)
    part.sum_(tensor, "test.sum")
    assert tensor.eq(3).all()
    assert part.gather("x", "test.gather") == ["x"] * 3


def test_slices_are_shared_in_place(comm, groups):
    for part in (comm, *groups[:2]):
        numbers = torch.full((5 * part.size,), float("nan"), dtype=torch.float32)
        place = numbers.data_ptr()
        numbers.split(5)[part.rank].fill_(part.rank + 1)
        before = part.traffic.collectives
        part.share_slices_(numbers, "test.share")
        assert numbers.view(part.size, 5).T.tolist() == [[float(rank + 1) for rank in range(part.size)]] * 5
        assert (numbers.data_ptr(), part.traffic.collectives - before) == (place, int(part.size > 1))
        part.share_slices_(torch.empty(0, dtype=torch.float32), "test.nothing")
