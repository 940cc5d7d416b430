"""Tests on one GPU, by one rank and by several that share it: `make test-gpu`, or `python -m pytest tests/gpu` anywhere.

They need torch, torchvision, numpy, h5py, pytest with pytest-timeout, and mpi4py with an MPI, but no Horovod: ranks that
share a GPU talk over mpi4py, through host memory. Where Horovod is built with NCCL, its tests run too. Without a GPU
everything is skipped; `--device cpu` runs the same code on the CPU.
"""

import os
from pathlib import Path

os.environ.setdefault("HVDLOCAL_BACKEND", "mpi4py")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products; read when CUDA starts

import pytest
import torch
from support.ranks import *  # noqa: F403
from support.ranks import SIZE

collect_ignore = [] if SIZE == 1 else [path.name for path in Path(__file__).parent.glob("test_*.py")]


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="where the tests of tests/gpu compute")


def pytest_configure(config):
    torch.set_num_threads(1)


def pytest_report_header(config):
    where = config.getoption("--device")
    if where == "cuda" and torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    return f"hvdlocal: {SIZE} rank{'s' if SIZE > 1 else ''} on {where}, torch {torch.__version__}"


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs a GPU; --device cpu runs the same on the CPU"))


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    where = torch.device(request.config.getoption("--device"))
    if where.type == "cuda":
        where = torch.device("cuda", 0)
        torch.cuda.set_device(where)
    return where


@pytest.fixture
def deterministic():
    """Kernels whose results do not depend on the order in which threads come to add."""
    before = torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = before
