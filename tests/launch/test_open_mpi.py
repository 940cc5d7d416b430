"""What a killed Open MPI leaves: nothing on this machine after the tests, and nothing that keeps another one from starting."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.launch import MPIRUN, environment, launch

JOINED = """
import time
from mpi4py import MPI
MPI.COMM_WORLD.allreduce(1)
print("joined", flush=True)
time.sleep(600)
"""


@pytest.fixture
def kill() -> Callable[..., int]:
    def start_and_kill(**env: str) -> int:
        """Kills an mpirun and its ranks while they run, so that nothing of theirs is cleared up; returns its process id."""
        command = [*MPIRUN, "-np", "2", sys.executable, "-c", JOINED]
        process = subprocess.Popen(
            command, env=environment(**env), stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(2)] == ["joined", "joined"]
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=True)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        return process.pid

    return start_and_kill


def test_nothing_is_left_where_others_look(kill, tmp_path):
    """These tests kill many."""
    here = environment()
    places = {Path(path) for name, path in here.items() if name.startswith(("OMPI_MCA_", "PRTE_MCA_"))}
    assert all(path.name.startswith("hvdlocal-mpi-") for path in places)
    before = {place: set(place.iterdir()) for place in places}
    kill(TMPDIR=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    left = [path for place in places for path in set(place.iterdir()) - before[place]]
    assert len(left) >= 2, "segments of both ranks, and files"
    assert {path.parent for path in left} == places


def test_a_process_id_that_comes_round_again(kill, tmp_path):
    """Open MPI 5 fails when it finds the directory of an earlier mpirun with its process id; install/mpirun removes it."""
    killed = kill(PRTE_MCA_prte_tmpdir_base=str(tmp_path), OMPI_MCA_orte_tmpdir_base=str(tmp_path))
    left = tmp_path / f"ompi.{killed}"
    if not left.is_dir():
        pytest.skip("this MPI leaves no directory that is named after the process id alone")
    again = f"mv {left} {tmp_path}/ompi.$$ && exec {shlex.join(MPIRUN)} -np 1 hostname"
    result = launch("bash", "-c", again, PRTE_MCA_prte_tmpdir_base=str(tmp_path))
    assert result.code == 0, result.err
    assert os.listdir(tmp_path) == []
