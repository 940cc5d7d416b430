"""Tests that run under mpirun with any number of ranks, over the backend that HVDLOCAL_BACKEND names.

Every test is executed by all ranks in the same order; nothing may be skipped on some ranks only. A failure on one rank ends the
job (`pytest -x`), so that the others do not wait for it.
"""

import io
import os
import sys
from pathlib import Path

import pytest
import torch
from _pytest.config import create_terminal_writer
from default_dtype import _another_default_dtype  # noqa: F401

import hvdlocal

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/golden

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))


def pytest_configure(config):
    torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    if RANK:  # one report is enough, unless something fails
        reporter = session.config.pluginmanager.getplugin("terminalreporter")
        session.config.quiet_report = io.StringIO()
        reporter._tw = create_terminal_writer(session.config, session.config.quiet_report)


def pytest_report_header(config):
    comm = hvdlocal.init()
    return f"hvdlocal: backend {comm.backend}, {comm.size} ranks"


def pytest_sessionfinish(session, exitstatus):
    session.config.failed = exitstatus not in (0, pytest.ExitCode.NO_TESTS_COLLECTED)


def pytest_unconfigure(config):
    if getattr(config, "failed", False):
        if RANK:
            print(f"---- rank {RANK} ----\n{config.quiet_report.getvalue()}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        hvdlocal.init().abort(1)  # the others wait in a collective that this rank will not come to


@pytest.fixture(scope="session")
def comm():
    return hvdlocal.init()


@pytest.fixture(autouse=True)
def _everyone_is_here(comm, request):
    """Fails fast, with the test's name, when the ranks are not in the same test."""
    names = comm.gather(request.node.nodeid, "test.start")
    assert set(names) == {request.node.nodeid}
