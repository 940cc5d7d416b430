"""Jobs that go on without the ranks that die, and what they cannot do without."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest
from jobs import Job
from small_runs import steps_done, write_config
from support.launch import HVDLOCAL, launch
from support.records import records

# Every wait has a deadline of its own, after which the jobs are ended; after this one they are not.
pytestmark = pytest.mark.timeout(900)

NODE = {"SLURMD_NODENAME": "n2"}
"""What distinguishes the processes on the node where the batch script does not run."""


@pytest.fixture
def start(sbatch, data, tmp_path) -> Callable[..., Job]:
    """Submits a script of `hvdlocal slurm --survive`, for two ranks on each node, and waits until they have averaged."""

    def submit(*settings: str) -> Job:
        config, script = write_config(tmp_path, data, epochs=40), tmp_path / "job.sbatch"
        options = ["--template", "cpu", "--nodes", "2", "--ntasks-per-node", "2", "--survive", "--output", str(script)]
        made = launch(*HVDLOCAL, "slurm", *options, str(config), *settings)
        assert made.code == 0, made.err
        job = sbatch("--ntasks-per-node=2", "--cpus-per-task=1", script)
        job.wait_for("30 steps", lambda: steps_done(tmp_path / "out") >= 30, 240)
        assert (len(job.ranks(**NODE)), len(job.ranks())) == (2, 4)
        return job

    return submit


def kill(processes: Iterable[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def lost(directory: Path) -> list[int]:
    """The ranks that the run says it has lost."""
    return sorted(rank for record in records(directory) if record["kind"] == "lost" for rank in record["ranks"])


def steps_recorded(directory: Path) -> list[int]:
    return [record["step"] for record in records(directory) if record["kind"] == "steps"]


def test_the_ranks_of_one_node_die_and_those_of_the_other_finish(start, tmp_path):
    job = start()
    kill(job.ranks(**NODE))
    job.wait_for_state("COMPLETED", 400)
    assert job.restarts == 0, job.report()
    assert lost(tmp_path / "out") == [2, 3]
    assert "#SBATCH --no-kill" in (tmp_path / "job.sbatch").read_text()
    steps = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert steps_recorded(tmp_path / "out") == list(range(1, steps + 1))
    assert job.open_mpi_files() == []


def test_too_few_ranks_are_left(start, tmp_path):
    job = start("--min_workers", "3")
    kill(job.ranks(**NODE))
    job.wait_for_state("COMPLETED", 400)
    assert job.restarts == 1, job.report()
    assert "exit code 85" in job.text()
    assert "continuing from the checkpoint of step" in job.text()
    steps = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert steps_recorded(tmp_path / "out") == list(range(1, steps + 1))


@pytest.mark.parametrize(
    "victims",
    [
        pytest.param(lambda job: job.ranks(), id="all ranks"),
        # With Open MPI's daemon and Slurm's, as when the node fails: mpirun 5.0 then ends the other ranks itself.
        pytest.param(lambda job: job.processes(**NODE), id="one node with its daemons"),
    ],
)
def test_what_mpirun_does_not_survive_costs_a_restart(start, tmp_path, victims):
    """Its exit code is 0 all the same."""
    job = start("--checkpoint.every_steps", "10")
    kill(victims(job))
    job.wait_for_state("COMPLETED", 400)
    assert job.restarts == 1, job.report()
    assert "mpirun ended with 0, but the run is not finished" in job.text()
    assert "continuing from the checkpoint of step" in job.text()
    steps = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert steps_recorded(tmp_path / "out") == list(range(1, steps + 1))
