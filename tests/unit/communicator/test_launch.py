"""Launchers and libraries that do not belong together, and wrong environment variables."""

import os
import sys
import types

import pytest
import torch

from hvdlocal.communicator import CommunicationError, Communicator, launch, launched_rank, launched_size
from hvdlocal.communicator.horovod_backend import HorovodCommunicator

VARIABLES = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"]


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variable", VARIABLES)
def test_processes_that_do_not_see_each_other(monkeypatch, variable):
    launch._check_world(1, "horovod")
    monkeypatch.setenv(variable, "4")
    launch._check_world(4, "horovod")
    with pytest.raises(RuntimeError, match="started 4 ranks, but horovod sees 1"):
        launch._check_world(1, "horovod")


def test_torchrun_starts_ranks_of_one_engine_only(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch._check_world(2, "torch")
    with pytest.raises(
        RuntimeError, match=r"tell of 2 ranks .* but mpi4py sees 1: .* HVDLOCAL_BACKEND=torch alone; unset RANK"
    ):
        launch._check_world(1, "mpi4py")


def test_slurm_counts_the_daemons_of_mpirun(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    launch._check_world(8, "horovod")


def test_what_the_launcher_says(monkeypatch):
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert (launched_rank(), launched_size()) == (None, None)
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "3")
    assert (launched_rank(), launched_size()) == (0, 3)


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan"])
def test_timeout(monkeypatch, text):
    monkeypatch.setenv("HVDLOCAL_TIMEOUT_SECONDS", "12.5")
    assert launch._timeout_from_environment() == 12.5
    monkeypatch.setenv("HVDLOCAL_TIMEOUT_SECONDS", text)
    with pytest.raises(ValueError, match=f"HVDLOCAL_TIMEOUT_SECONDS='{text}'"):
        launch._timeout_from_environment()


def test_unknown_backend_and_missing_init():
    with pytest.raises(ValueError, match="unknown backend 'nccl'"):
        launch.init("nccl")
    with pytest.raises(RuntimeError, match=r"call hvdlocal.init\(\) first"):
        launch.current()


class Ended(Communicator):
    """A communicator that can be shut down, of a backend whose every collective fails."""

    backend = "none"
    is_open = True
    can_be_replaced = False

    def __init__(self, error=None):
        super().__init__(0, 2, 0, 2, 1.0)
        self._error = error

    def shutdown(self):
        self.is_open = False

    def _join_group(self, groups, name):
        raise self._error

    def _start_sum(self, flat, name):
        raise self._error

    def _start_broadcast(self, flat, name, root):
        raise self._error

    def _gather_bytes(self, data, name):
        raise self._error

    def _says_that_a_peer_left(self, error):
        return "left" in str(error)


COLLECTIVES = {
    "sum": lambda c: c.sum_(torch.ones(1), "n"),
    "broadcast": lambda c: c.broadcast_(torch.ones(1), "n"),
    "gather": lambda c: c.gather(1, "n"),
    "barrier": lambda c: c.barrier("n"),
}


@pytest.mark.parametrize("collective", COLLECTIVES.values(), ids=COLLECTIVES)
def test_why_a_collective_failed(collective):
    with pytest.raises(CommunicationError, match=r"the collective 'n' cannot complete.* merely finished.*\(it left\)"):
        collective(Ended(RuntimeError("it left")))
    with pytest.raises(CommunicationError, match=r"'n' failed, .* did not ask for the same .*\(shapes differ\)"):
        collective(Ended(RuntimeError("shapes differ")))
    ended = Ended()
    ended.shutdown()
    with pytest.raises(CommunicationError, match=r"rank 0 of 2 .* 'n' was called after shutdown\(\)"):
        collective(ended)


def test_a_communicator_that_was_shut_down_is_not_given_out(monkeypatch):
    ended = Ended()
    monkeypatch.setattr(launch, "_current", ended)
    assert launch.init() is launch.current() is ended
    ended.shutdown()
    with pytest.raises(RuntimeError, match="not initialised"):
        launch.current()
    with pytest.raises(RuntimeError, match=r"init\(\) after shutdown\(\): .* MPI has ended"):
        launch.init()
    ended.can_be_replaced = True
    again = Ended()
    monkeypatch.setattr(launch, "_mpi4py", lambda timeout, survive: again)
    monkeypatch.setattr(launch, "_check_world", lambda size, backend: None)
    monkeypatch.setattr(launch, "form_islands", lambda communicator, island: None)
    assert launch.init("mpi4py") is launch.current() is again


@pytest.mark.parametrize(("chosen", "expected"), [(None, "5"), ("2", "2")])
def test_horovod_starts_with_a_long_cycle(monkeypatch, chosen, expected):
    """Unless the user has chosen one; Horovod reads it when it starts, here a stand-in."""
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", chosen or "")
    if chosen is None:
        monkeypatch.delenv("HOROVOD_CYCLE_TIME")
    horovod = types.ModuleType("horovod.torch")
    horovod.init = lambda process_sets: started.append((process_sets, os.environ["HOROVOD_CYCLE_TIME"]))
    horovod.global_process_set = None
    horovod.rank = horovod.local_rank = lambda: 0
    horovod.size = horovod.local_size = lambda: 1
    horovod.mpi_enabled = lambda: False
    started = []
    parent = types.ModuleType("horovod")
    parent.torch = horovod
    monkeypatch.setitem(sys.modules, "horovod", parent)
    monkeypatch.setitem(sys.modules, "horovod.torch", horovod)
    HorovodCommunicator(timeout_seconds=1.0)
    HorovodCommunicator(timeout_seconds=1.0, divisible=True)
    assert started == [(None, expected), ("dynamic", expected)], "the dynamic mode costs every cycle something"
