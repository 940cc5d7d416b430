"""Tests that run under mpirun with any number of ranks, over the backend that HVDLOCAL_BACKEND names; see support/ranks.py."""

import os

import pytest
import torch
from default_dtype import _another_default_dtype  # noqa: F401
from support.islands import with_islands
from support.ranks import *  # noqa: F403
from support.ranks import SIZE

import hvdlocal

# Small models meet often: at hvdlocal's default of 5 ms most of the time would be Horovod's sleep between two cycles.
os.environ.setdefault("HOROVOD_CYCLE_TIME", "1")
# Tests that split the communicator need it, and Horovod starts only once in a process.
os.environ.setdefault("HOROVOD_DYNAMIC_PROCESS_SETS", "1")


def pytest_configure(config):
    torch.set_num_threads(1)


def pytest_report_header(config):
    comm = hvdlocal.init()
    return f"hvdlocal: backend {comm.backend}, {comm.size} ranks"


@pytest.fixture(params=[n for n in (2, 3, 4) if SIZE % n == 0], ids=lambda n: f"{SIZE // n}x{n}")
def islands(request, comm):
    """The communicator with islands of so many ranks."""
    return with_islands(comm, request.param)


@pytest.fixture(params=[n for n in (1, 2, 3, 4) if SIZE % n == 0 and SIZE > 1], ids=lambda n: f"{SIZE // n}x{n}")
def layout(request, comm):
    """The communicator with islands of so many ranks, one included."""
    return with_islands(comm, request.param)


@pytest.fixture(autouse=True)
def _together(request):
    request.getfixturevalue("everyone_is_here")
