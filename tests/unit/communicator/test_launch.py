"""Launchers and libraries that do not belong together, and wrong environment variables."""

import pytest

from hvdlocal.communicator import launch, launched_rank, launched_size

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
