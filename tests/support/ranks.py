"""Hooks and fixtures for tests that run under mpirun with any number of ranks; imported by the conftest.py of such tests.

Every test is executed by all ranks in the same order; nothing may be skipped on some ranks only. A failure on one rank ends the
job (`pytest -x`), so that the others do not wait for it.
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from _pytest.config import create_terminal_writer
from support.datasets import write_three_classes

import hvdlocal
from hvdlocal.communicator import launched_rank, launched_size

RANK = launched_rank() or 0
SIZE = launched_size() or 1


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    if RANK:  # one report is enough, unless something fails
        reporter = session.config.pluginmanager.getplugin("terminalreporter")
        session.config.quiet_report = io.StringIO()
        reporter._tw = create_terminal_writer(session.config, session.config.quiet_report)


def pytest_sessionfinish(session, exitstatus):
    session.config.failed = exitstatus not in (0, pytest.ExitCode.NO_TESTS_COLLECTED)


def pytest_unconfigure(config):
    if getattr(config, "failed", False):
        if RANK:
            print(f"---- rank {RANK} ----\n{config.quiet_report.getvalue()}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if SIZE > 1:
            hvdlocal.init().abort(1)  # the others wait in a collective that this rank will not come to


@pytest.fixture(scope="session")
def comm():
    return hvdlocal.init()


@pytest.fixture(scope="session")
def place(comm):
    """A directory that all ranks share; the data set of `write_three_classes` is in `place / "data"`."""
    path = Path(comm.gather(tempfile.mkdtemp() if comm.rank == 0 else "", "test.place")[0])
    if comm.rank == 0:
        write_three_classes(path / "data")
    comm.barrier("test.data")
    yield path
    comm.barrier("test.place_end")
    if comm.rank == 0:
        shutil.rmtree(path)


@pytest.fixture
def everyone_is_here(comm, request):
    """Fails fast, with the test's name, when the ranks are not in the same test."""
    names = comm.gather(request.node.nodeid, "test.start")
    assert set(names) == {request.node.nodeid}
