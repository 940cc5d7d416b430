"""Hooks and fixtures for tests that run under mpirun with any number of ranks; imported by the conftest.py of such tests.

Every test is executed by all ranks in the same order; nothing may be skipped on some ranks only. A failure on one rank ends the
job (`pytest -x`), so that the others do not wait for it.
"""

import io
import sys

import pytest
from _pytest.config import create_terminal_writer

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


@pytest.fixture
def everyone_is_here(comm, request):
    """Fails fast, with the test's name, when the ranks are not in the same test."""
    names = comm.gather(request.node.nodeid, "test.start")
    assert set(names) == {request.node.nodeid}
