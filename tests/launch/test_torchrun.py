"""The engine over torch.distributed where there is neither Horovod nor an MPI."""

from __future__ import annotations

import sys

import pytest
from support.launch import HVDLOCAL, MPIRUN, launch

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

BESIDE = """
import sys, torch, hvdlocal
import torch.distributed as dist
comm = hvdlocal.init(island=2)
dist.init_process_group("gloo")
theirs, ours = torch.ones(2), torch.ones(2)
dist.all_reduce(theirs)
comm.sum_(ours, "test.ours")
dist.destroy_process_group()
comm.island.sum_(ours, "test.island")
sys.stderr.write(f"rank {comm.rank}, {comm.local_rank} of {comm.local_size} here: {theirs.tolist()} and {ours.tolist()}\\n")
"""


@pytest.fixture
def without_mpi(tmp_path) -> dict[str, str]:
    """Settings with which neither Horovod nor mpi4py can be imported."""
    for name in ("horovod", "mpi4py"):
        (tmp_path / "hidden" / name).mkdir(parents=True)
        (tmp_path / "hidden" / name / "__init__.py").write_text(f"raise ImportError('no {name} here')")
    return {"PYTHONPATH": str(tmp_path / "hidden"), "HVDLOCAL_BACKEND": "torch"}


def test_torchrun_trains(config, tmp_path, without_mpi):
    result = launch(*TORCHRUN, "-m", "hvdlocal", "train", str(config), **without_mpi)
    assert result.code == 0, result.err
    assert "local-ada on 2 ranks" in result.out


def test_mpirun_needs_the_address_of_rank_0(config, without_mpi):
    """Or an MPI that can be asked for it; the refusal is one sentence."""
    result = launch(*MPIRUN, "-np", "2", *HVDLOCAL, "train", str(config), **without_mpi)
    assert result.code == 2, result.err
    assert "hvdlocal (rank 0): the 2 ranks do not find each other: the launcher does not tell" in result.err
    assert "set MASTER_ADDR to the host of rank 0" in result.err
    assert "Traceback" not in result.err


def test_a_script_uses_torch_distributed_beside(tmp_path, without_mpi):
    """Its process group and hvdlocal's meet at the same address and do not notice each other, even when one of them ends."""
    script = tmp_path / "script.py"
    script.write_text(BESIDE)
    result = launch(*TORCHRUN, str(script), **without_mpi)
    assert result.code == 0, result.err
    for rank in range(2):
        assert f"rank {rank}, {rank} of 2 here: [2.0, 2.0] and [4.0, 4.0]" in result.err
