"""Jobs that are stopped or hurt: they requeue themselves and go on as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TEMPLATES
from jobs import Job
from small_runs import ENDLESS, assert_same_numbers, steps_done, write_config
from support.launch import HVDLOCAL, mpirun

# Every wait has a deadline of its own, after which the jobs are ended; after this one they are not.
pytestmark = pytest.mark.timeout(600)

TEMPLATE = TEMPLATES / "cpu.sbatch"

ARRAY = """\
#!/bin/bash
source slurm/common.sh
train='trap "exit 85" USR2; echo "task $SLURM_ARRAY_TASK_ID trains"; while :; do sleep 0.1; done'
if [[ $SLURM_ARRAY_TASK_ID == 0 || -n ${SLURM_RESTART_COUNT:-} ]]; then train=true; fi
run bash -c "$train"
finish
"""

WRONG = """\
#!/bin/bash
source slurm/common.sh
mpirun_over "$tasks"
run "${mpirun[@]}" --no-such-option true
finish
"""


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> Path:
    """What the run comes to when nothing happens to it, and without Slurm."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    result = mpirun(2, *HVDLOCAL, "train", str(write_config(directory, data)), timeout=240)
    assert result.code == 0, result.err
    return directory / "out"


def wait_for_steps(job: Job, directory: Path, steps: int) -> None:
    job.wait_for(f"{steps} steps", lambda: steps_done(directory) >= steps, 120)


def assert_continued(job: Job) -> None:
    """It was started again, and did not begin again."""
    assert re.search(r"continuing from the checkpoint of step [1-9]", job.text()), job.report()


def test_a_signalled_job_ends_with_the_same_numbers(sbatch, data, tmp_path, uninterrupted):
    job = sbatch(TEMPLATE, write_config(tmp_path, data))
    wait_for_steps(job, tmp_path / "out", 100)
    job.signal("USR2")
    job.wait_for_state("COMPLETED", 240)
    assert job.restarts == 1, job.report()
    assert_continued(job)
    assert_same_numbers(tmp_path / "out", uninterrupted)


def test_a_killed_rank_costs_a_restart_and_nothing_else(sbatch, data, tmp_path, uninterrupted):
    job = sbatch(TEMPLATE, write_config(tmp_path, data), "--checkpoint.every_steps", "40")
    job.wait_for("checkpoint", (tmp_path / "out" / "checkpoints" / "latest").exists, 120)
    assert job.open_mpi_files() != []
    os.kill(max(job.ranks()), signal.SIGKILL)
    job.wait_for_state("COMPLETED", 240)
    assert job.restarts == 1, job.report()
    assert_continued(job)
    assert job.open_mpi_files() == []
    assert_same_numbers(tmp_path / "out", uninterrupted)


def test_a_launcher_that_gets_term_costs_a_restart(sbatch, data, tmp_path):
    """Not from the script, which would send USR2. Open MPI 5 answers with 1, as Python after a bug; Open MPI 4 does not."""
    job = sbatch(TEMPLATE, write_config(tmp_path, data, epochs=40), "--checkpoint.every_steps", "40")
    job.wait_for("checkpoint", (tmp_path / "out" / "checkpoints" / "latest").exists, 120)
    os.kill(job.launcher(), signal.SIGTERM)
    job.wait_for_state("COMPLETED", 240)
    assert job.restarts == 1, job.report()
    assert_continued(job)


def test_a_launcher_that_never_starts_is_not_started_for_ever(sbatch, tmp_path):
    script = tmp_path / "wrong.sbatch"
    script.write_text(WRONG)
    job = sbatch(script)
    job.wait_for_state("FAILED", 90)
    assert job.restarts == 2, job.report()
    assert "failed three times in a row" in job.text()


def test_a_job_leaves_before_its_time_limit(sbatch, data, tmp_path):
    """By itself: Slurm sends nothing that counts. One minute is the shortest limit there is, and the run would take days, so that
    it is not over before on any machine.
    """
    job = sbatch("--time=1", "--signal=B:CONT@1", TEMPLATE, write_config(tmp_path, data, ENDLESS))
    job.wait_for("restart", lambda: job.restarts > 0, 90)
    assert "the time is over" in job.text(), job.report()
    done = steps_done(tmp_path / "out")
    wait_for_steps(job, tmp_path / "out", done + 1)
    assert_continued(job)


def test_one_task_of_an_array_starts_again_alone(sbatch, tmp_path):
    """Slurm takes the bare id of an array's last task for the whole array. A few lines of bash stand in for the training."""
    script = tmp_path / "array.sbatch"
    script.write_text(ARRAY)
    array = sbatch("--array=0-1", script)
    first, last = (replace(array, id=f"{array.id}_{task}") for task in (0, 1))
    last.wait_for_text("task 1 trains", 30)
    first.wait_for_state("COMPLETED", 30)
    last.signal("USR2")
    last.wait_for_state("COMPLETED", 30)
    assert (first.restarts, last.restarts) == (0, 1), last.report()
