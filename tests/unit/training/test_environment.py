"""Devices and threads for ranks that share a machine."""

import pytest
import torch

from hvdlocal.training import environment
from hvdlocal.training.environment import choose_device, set_threads, sharing


class Ranks:
    def __init__(self, local_rank=0, local_size=1, others=()):
        self.local_rank, self.local_size, self.others = local_rank, local_size, list(others)

    def gather(self, value, name):
        return [value, *self.others]


@pytest.fixture
def gpus(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_one_gpu_per_local_rank(gpus):
    assert choose_device("auto", Ranks(local_rank=2, local_size=4)) == torch.device("cuda", 2)
    assert gpus == [torch.device("cuda", 2)]
    with pytest.raises(ValueError, match=r"5 ranks on .* for 4 GPUs"):
        choose_device("cuda", Ranks(local_rank=2, local_size=5))


def test_a_launcher_may_show_each_rank_its_own_gpu(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda", Ranks(local_rank=3, local_size=4)) == torch.device("cuda", 0)


def test_without_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", Ranks()) == torch.device("cpu")
    with pytest.raises(ValueError, match="device=cuda"):
        choose_device("cuda", Ranks())


def test_ranks_that_share_cores():
    me = ("a", [0, 1, 2, 3])
    assert sharing(me, [me]) == 1
    assert sharing(me, [me, me, ("b", [0, 1, 2, 3])]) == 2, "another host has cores of its own"
    assert sharing(me, [me, ("a", [4, 5]), ("a", [3, 4])]) == 2


def test_threads(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(environment.socket, "gethostname", lambda: "a")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    same = ("a", list(range(8)))
    set_threads(None, Ranks(others=[same, same, same]))
    set_threads(5, Ranks(others=[same]))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    set_threads(None, Ranks(others=[same]))
    assert set_to == [2, 5], "and OMP_NUM_THREADS is torch's own business"
