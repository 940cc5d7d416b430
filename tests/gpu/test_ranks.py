"""Several ranks on one GPU, and Horovod where it can use one: whole jobs, each with a deadline."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hvdlocal import ShardWriter

ROOT = Path(__file__).parents[2]
SHARED = Path(__file__).parent / "shared"


def launch(ranks, *command, timeout=150, **environment):
    """Runs a job; whatever it started is gone afterwards."""
    process = subprocess.Popen(
        [str(ROOT / "install" / "mpirun"), "-np", str(ranks), sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"no end within {timeout} s:\n{output[-5000:]}")
    return process.returncode, output


def shared_tests(ranks, device, **environment):
    code, output = launch(
        ranks, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--device", device.type, str(SHARED), **environment
    )
    assert code == 0, output[-5000:]
    assert " passed" in output


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
    code, output = launch(2, str(Path(__file__).parent / "without_memory.py"), "train", str(config), timeout=90)
    assert code != 0
    assert "rank 1 of 2" in output
    assert "cannot go on after step 3: " in output
    assert "out of memory" in output.lower()
    assert "is a bug of hvdlocal" not in output, output
