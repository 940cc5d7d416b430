"""Several ranks on one GPU, and Horovod where it can use one: whole jobs, each with a deadline."""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from support.launch import AS_USERS_START, ROOT, mpirun

from hvdlocal import ShardWriter

SHARED = Path(__file__).parent / "shared"


def shared_tests(ranks, device, **environment):
    tests = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--device", device.type, str(SHARED)]
    result = mpirun(ranks, sys.executable, *tests, timeout=150, **AS_USERS_START, **environment)
    assert result.code == 0, (result.out + result.err)[-5000:]
    assert " passed" in result.out


@pytest.fixture
def _mpirun():
    if shutil.which("mpirun") is None and not (ROOT / ".venv" / "bin" / "mpirun").exists():
        pytest.skip("there is no mpirun")


@pytest.mark.usefixtures("_mpirun")
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_device(device, ranks):
    shared_tests(ranks, device, HVDLOCAL_BACKEND="mpi4py")


@pytest.mark.usefixtures("_mpirun")
def test_horovod(device):
    """One rank: NCCL refuses two on one GPU."""
    if importlib.util.find_spec("horovod") is None:
        pytest.skip("Horovod is not installed")
    if device.type == "cuda":
        import horovod.torch as hvd

        if not hvd.nccl_built():
            pytest.skip("Horovod is built without NCCL")
    shared_tests(1, device, HVDLOCAL_BACKEND="horovod")


@pytest.mark.usefixtures("_mpirun")
def test_one_rank_without_memory_ends_the_job(device, tmp_path):
    """The other ranks end too, and the message names the rank and the cause."""
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    for split in ("train", "test"):
        ShardWriter(tmp_path / "data", split, classes=["a", "b"]).write(images, np.arange(64) % 2)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {{path: {tmp_path}/data, batch_size: 8}}\nmodel: {{name: digits_cnn}}\n"
        f"output: {tmp_path}/out\ndevice: {device.type}\n"
    )
    program = str(Path(__file__).parent / "without_memory.py")
    result = mpirun(2, sys.executable, program, "train", str(config), timeout=90, HVDLOCAL_BACKEND="mpi4py")
    output = result.out + result.err
    assert result.code != 0
    assert "rank 1 of 2" in output
    assert "cannot go on after step 3: " in output
    assert "out of memory" in output.lower()
    assert "is a bug of hvdlocal" not in output, output
