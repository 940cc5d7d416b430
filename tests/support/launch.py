"""Starts whole jobs as a user does, each with a deadline; for tests/launch and tests/slurm."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MPIRUN = [str(ROOT / "install" / "mpirun")]
HVDLOCAL = [sys.executable, "-m", "hvdlocal"]

QUICK_START = Path(__file__).parent / "quick_start"
AS_USERS_START = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
"""For the jobs that start as a user's do: the others leave out what takes time (`quick_start/sitecustomize.py`)."""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str
    seconds: float


def environment(**more: str) -> dict[str, str]:
    """Returns what a job's processes get: this environment without settings of hvdlocal and Horovod."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HVDLOCAL_", "HOROVOD_"))}
    paths = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": ":".join(filter(None, [str(QUICK_START), AS_USERS_START["PYTHONPATH"]])),
    }
    return {**kept, **paths, "OMP_NUM_THREADS": "1", **places_of_open_mpi(), **more}


@cache
def places_of_open_mpi() -> dict[str, str]:
    """Settings of Open MPI 4 and 5: what a killed mpirun and its ranks leave is removed with these directories."""
    files, memory = (tempfile.mkdtemp(prefix="hvdlocal-mpi-", dir=place) for place in (None, "/dev/shm"))
    for path in (files, memory):
        atexit.register(shutil.rmtree, path, ignore_errors=True)
    return {
        **dict.fromkeys(["OMPI_MCA_orte_tmpdir_base", "PRTE_MCA_prte_tmpdir_base"], files),
        **dict.fromkeys(["OMPI_MCA_btl_vader_backing_directory", "OMPI_MCA_btl_sm_backing_directory"], memory),
    }


def launch(*command: str, timeout: float = 120, **env: str) -> Result:
    """Runs a command; whatever it started is gone afterwards."""
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"no end within {timeout} s: {' '.join(command)}\n{out}\n{err}")
    # Open MPI 5 ends its own messages with a NUL, which would stand before the next line of a rank.
    return Result(process.returncode, out, err.replace("\0", ""), time.monotonic() - start)


def mpirun(ranks: int, *command: str, **settings) -> Result:
    return launch(*MPIRUN, "-np", str(ranks), *command, **settings)
