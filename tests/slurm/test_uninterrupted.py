"""Jobs that nothing happens to."""

from pathlib import Path

import pytest
from cluster import Cluster, SlurmError, wait_until
from conftest import TEMPLATES
from jobs import Job
from small_runs import ENDLESS, steps_done, write_config
from support.records import records

# Every wait has a deadline of its own, after which the jobs are ended; after this one they are not.
pytestmark = pytest.mark.timeout(600)


def require_pmix(slurm: Cluster) -> None:
    """By a trial: `srun --mpi=list` also names a plugin that Slurm's daemons cannot load."""
    one_task = ["srun", "--nodes=1", "--ntasks=1", "--time=2"]
    slurm.command(*one_task, "--mpi=none", "true")
    try:
        slurm.command(*one_task, "--mpi=pmix", "true")
    except SlurmError as error:
        pytest.skip(f"this Slurm starts no step with PMIx: {error}")


def test_mpirun_on_two_nodes(sbatch, data, tmp_path):
    job = sbatch(TEMPLATES / "cpu.sbatch", write_config(tmp_path, data, epochs=20))
    job.wait_for_state("COMPLETED", 150)
    assert "2 ranks on n[1-2]" in job.text()
    assert "local-ada on 2 ranks" in job.text(), "the summary"
    assert records(tmp_path / "out")[-1]["evaluation"]["accuracy"] > 0.9


def test_srun(slurm, sbatch, data, tmp_path):
    """On one node: both slurmd are on this machine and would put PMIx's files in the same place."""
    require_pmix(slurm)
    one_node = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2"]
    job = sbatch(*one_node, TEMPLATES / "gpu-nodes-srun.sbatch", write_config(tmp_path, data, epochs=20))
    job.wait_for_state("COMPLETED", 150)
    assert "2 ranks on n1" in job.text()
    assert "local-ada on 2 ranks" in job.text(), "the summary"


ISLAND = ["--method.island", "node", "--method.period.period", "4"]


def assert_trained_in_islands(job: Job, output: Path) -> None:
    """Two nodes of two ranks are two workers."""
    job.wait_for_state("COMPLETED", 150)
    assert "4 ranks on n[1-2]" in job.text()
    assert "2 islands of 2, so K = 2" in job.text(), "the header"
    end = records(output)[-1]
    assert (end["ranks"], end["island_size"], end["num_workers"]) == (4, 2, 2)
    assert end["evaluation"]["accuracy"] > 0.9


def test_a_node_is_one_worker(sbatch, data, tmp_path):
    config = write_config(tmp_path, data, epochs=20)
    job = sbatch("--ntasks-per-node=2", TEMPLATES / "cpu.sbatch", config, *ISLAND)
    assert_trained_in_islands(job, tmp_path / "out")


def test_srun_without_pmix(sbatch, data, tmp_path):
    """Engine torch needs no MPI: Slurm alone tells its ranks what they are, on two nodes, whose names are no hosts here."""
    config = write_config(tmp_path, data, epochs=20)
    variables = "--export=ALL,HVDLOCAL_BACKEND=torch,MASTER_ADDR=127.0.0.1"
    shape = ["--ntasks-per-node=2", "--gpus-per-node=2", variables]
    job = sbatch(*shape, TEMPLATES / "gpu-nodes-srun.sbatch", config, *ISLAND)
    assert_trained_in_islands(job, tmp_path / "out")


def test_data_are_staged_to_a_disk_of_the_node(sbatch, data, tmp_path):
    """On one node: the other one's disk is the same."""
    disk = f"--export=ALL,HVDLOCAL_LOCAL_DISK={tmp_path}"
    config = write_config(tmp_path, data, epochs=20)
    job = sbatch("--nodes=1", "--ntasks-per-node=2", disk, TEMPLATES / "staging.sbatch", data, config)
    job.wait_for_state("COMPLETED", 150)
    copy = tmp_path / f"hvdlocal-{job.id}"
    assert f"path: {copy}" in (tmp_path / "out" / "config.yaml").read_text()
    assert not copy.exists(), "left on the node"


def test_a_cancelled_job_leaves_nothing(sbatch, slurm, data, tmp_path):
    before = slurm.processes()
    job = sbatch(TEMPLATES / "cpu.sbatch", write_config(tmp_path, data, ENDLESS))
    job.wait_for("20 steps", lambda: steps_done(tmp_path / "out") >= 20, 120)
    assert len(job.ranks()) == 2, job.processes()
    assert job.open_mpi_files() != []
    job.cancel()
    job.wait_for_state("CANCELLED", 30)
    wait_until(lambda: slurm.processes().keys() <= before.keys(), 20, lambda: f"left: {slurm.processes()}")
    assert job.open_mpi_files() == []
