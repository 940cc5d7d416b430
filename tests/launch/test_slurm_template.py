"""The CPU template, as it is and made ready for a job, trains: run by bash as Slurm would run it, with Slurm's variables."""

import os

import pytest
from support.launch import HVDLOCAL, ROOT, launch


@pytest.fixture
def script(config, tmp_path, request) -> list[str]:
    """The command that Slurm would run."""
    if request.param == "plain":
        return ["slurm/cpu.sbatch", str(config), "--epochs", "2"]
    moved = config.rename(tmp_path / "my run.yaml")
    path = tmp_path / "job.sbatch"
    made = launch(*HVDLOCAL, "slurm", "--template", "cpu", "--output", str(path), str(moved), "--epochs", "2")
    assert made.code == 0, made.err
    return [str(path)]


@pytest.mark.parametrize("script", ["plain", "made"], indirect=True)
def test_template_trains(script):
    slurm = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_JOB_ID": f"{os.getpid()}",
    }
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    more = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    result = launch("bash", *script, **slurm, **root, **more, SLURM_SUBMIT_DIR=str(ROOT))
    assert result.code == 0, result.err
    assert f"job {os.getpid()}: 2 ranks" in result.out
    assert "local-ada on 2 ranks" in result.out
