"""The collectives, and that a wait ends."""

import os
import signal
import threading
import time

import pytest
import torch

import hvdlocal
from hvdlocal.communicator import CollectiveTimeoutError, DisagreementError, base, mpi4py_backend, require_agreement


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64])
def test_sum_is_in_place_and_the_same_everywhere(comm, dtype):
    tensor = torch.arange(5, dtype=dtype) * (comm.rank + 1)
    address = tensor.data_ptr()
    comm.sum_(tensor, "test.sum")
    total = comm.size * (comm.size + 1) // 2
    assert torch.equal(tensor, torch.arange(5, dtype=dtype) * total)
    assert tensor.data_ptr() == address


def test_sum_of_more_elements_than_one_collective_takes(comm, monkeypatch):
    monkeypatch.setattr(base, "MAX_ELEMENTS", 1000)
    tensor = torch.arange(4321, dtype=torch.float32) + comm.rank
    comm.sum_(tensor, "test.pieces")
    ranks = comm.size * (comm.size - 1) / 2
    assert torch.equal(tensor, torch.arange(4321, dtype=torch.float32) * comm.size + ranks)


@pytest.mark.parametrize("piece", [1000, 4004, 17_284])
def test_sum_in_pieces(comm, monkeypatch, piece):
    """Plain MPI sums pieces of so many bytes where ranks share memory; it is one collective all the same."""
    monkeypatch.setattr(mpi4py_backend, "PIECE_BYTES", piece)
    tensor = torch.arange(4321, dtype=torch.float32) * (comm.rank + 1)
    comm.sum_(tensor, "test.sum")
    assert torch.equal(tensor, torch.arange(4321, dtype=torch.float32) * (comm.size * (comm.size + 1) // 2))


def test_sum_refuses_what_it_would_have_to_copy(comm):
    with pytest.raises(ValueError, match="contiguous"):
        comm.sum_(torch.zeros(4, 4).t(), "test.strided")


@pytest.mark.parametrize(
    "make",
    [
        lambda rank: torch.full((3, 2), float(rank)),
        lambda rank: torch.tensor(rank),
        lambda rank: torch.tensor([rank % 2 == 0, True]),
        lambda rank: torch.full((4,), rank, dtype=torch.bfloat16),
        lambda rank: torch.full((2, 3, 4, 5), float(rank)).to(memory_format=torch.channels_last),
    ],
    ids=["matrix", "scalar", "bool", "bfloat16", "channels_last"],
)
def test_broadcast(comm, make):
    root = comm.size - 1
    tensor = make(comm.rank)
    strides = tensor.stride()
    comm.broadcast_(tensor, "test.broadcast", root)
    assert torch.equal(tensor, make(root))
    assert tensor.stride() == strides


def test_gather_takes_values_of_different_sizes(comm):
    values = comm.gather({"rank": comm.rank, "data": "x" * 100 * comm.rank}, "test.gather")
    assert values == [{"rank": r, "data": "x" * 100 * r} for r in range(comm.size)]


def test_traffic_is_counted(comm):
    before = (comm.traffic.collectives, comm.traffic.bytes)
    comm.sum_(torch.zeros(10), "test.traffic")
    several = comm.size > 1
    assert (comm.traffic.collectives - before[0], comm.traffic.bytes - before[1]) == ((1, 40) if several else (0, 0))


def test_a_wait_has_a_deadline_and_says_what_for(comm, monkeypatch):
    """Rank 0 comes at once and gives up; the others come later, and the ranks are together again afterwards."""
    tensor = torch.ones(1)
    if comm.size > 1 and comm.rank == 0:
        monkeypatch.setattr(comm, "timeout_seconds", 0.2)
        with pytest.raises(CollectiveTimeoutError, match=rf"rank 0 of {comm.size} .* 'test.late'"):
            comm.sum_(tensor, "test.late")
        monkeypatch.undo()
    else:
        time.sleep(0.5)
        comm.sum_(tensor, "test.late")
    comm.barrier("test.together")


def test_signals_are_seen_while_waiting(comm):
    seen = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: seen.append(time.monotonic()))
    try:
        if comm.rank == 0:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        else:
            time.sleep(0.6)
        comm.barrier("test.signal")
        done = time.monotonic()
        if comm.rank == 0:
            while not seen and time.monotonic() < done + 5:  # a single rank does not wait at all
                time.sleep(0.01)
            assert seen
            assert comm.size == 1 or seen[0] < done - 0.2
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_disagreement_names_rank_and_key_on_every_rank(comm):
    require_agreement(comm, {"a": 1}, "test.agree")
    if comm.size == 1:
        return
    with pytest.raises(DisagreementError, match=rf"rate: rank {comm.size - 1} has 0.2, rank 0 has 0.1"):
        require_agreement(comm, {"rate": 0.2 if comm.rank == comm.size - 1 else 0.1, "same": 3}, "test.agree")


def test_init_is_idempotent_and_refuses_another_backend(comm):
    assert hvdlocal.init() is comm
    assert hvdlocal.init(comm.backend) is comm
    with pytest.raises(ValueError, match="already uses"):
        hvdlocal.init("mpi4py" if comm.backend == "horovod" else "horovod")
