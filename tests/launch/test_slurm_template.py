"""The sbatch template, run by bash as Slurm would run it, with Slurm's variables."""

from conftest import launch


def test_template_trains(config):
    slurm = {"SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": "."}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    more = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    result = launch("bash", "slurm/train.sbatch", str(config), "--epochs", "2", **slurm, **root, **more)
    assert result.code == 0, result.err
    assert "job 7: 2 ranks" in result.out
    assert "local-ada on 2 ranks" in result.out
