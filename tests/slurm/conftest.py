"""One real Slurm for all tests of this directory; they are skipped, with the reason, where there is none to be had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing_programs, running_cluster
from jobs import Job, submit
from support.datasets import write_three_classes
from support.launch import environment, places_of_open_mpi

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "slurm"

# Containers and CI machines run as root and have fewer cores than jobs have ranks; a cluster needs none of this.
ANYWHERE = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The data set of `write_three_classes`."""
    directory = tmp_path_factory.mktemp("data")
    write_three_classes(directory)
    return directory


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"no Slurm to test with: {', '.join(missing)} missing (install/slurm.sh)")
    here = environment(**ANYWHERE)
    for name in list(here):
        if name.startswith("SLURM_") or name in places_of_open_mpi():  # the templates have places of their own
            del here[name]
    with running_cluster(here) as cluster:
        yield cluster


@pytest.fixture
def sbatch(slurm, tmp_path) -> Iterator[Callable[..., Job]]:
    """Submits on both nodes, a task on each, unless told otherwise. No job outlives its test."""
    jobs = []

    def on_both_nodes(*arguments: str | Path) -> Job:
        shape = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", f"--chdir={ROOT}"]
        jobs.append(submit(slurm, tmp_path / f"job-{len(jobs) + 1}.out", *shape, *map(str, arguments)))
        return jobs[-1]

    yield on_both_nodes
    for job in jobs:
        job.cancel()
        job.wait_for_end(30)
