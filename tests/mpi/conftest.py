"""Tests that run under mpirun with any number of ranks, over the backend that HVDLOCAL_BACKEND names; see support/ranks.py."""

import os

import pytest
import torch
from default_dtype import _another_default_dtype  # noqa: F401
from support.ranks import *  # noqa: F403

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


@pytest.fixture(autouse=True)
def _together(request):
    request.getfixturevalue("everyone_is_here")
