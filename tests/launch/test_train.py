"""`hvdlocal train`, `doctor` and the examples under every launcher."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from support.launch import AS_USERS_START, HVDLOCAL, QUICK_START, ROOT, launch, mpirun
from support.records import records

from hvdlocal.models import build_model


@pytest.mark.parametrize(("preset", "environment"), [("local-ada", AS_USERS_START), ("sync", {}), ("acc-ada", {})])
def test_two_ranks(config, tmp_path, preset, environment):
    """tests/mpi/test_train.py has the other presets and settings."""
    command = [*HVDLOCAL, "train", str(config), "--method.preset", preset, "--method.period.period", "2"]
    result = mpirun(2, *command, **environment)
    assert result.code == 0, result.err
    assert f"{preset} on 2 ranks" in result.out
    end = records(tmp_path / "out", "end")[0]
    assert end["evaluation"]["samples"] == 31, "every test image once"
    assert end["evaluation"]["accuracy"] == 1.0
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    build_model("digits_cnn", 3, (8, 8, 1)).load_state_dict(state)


def test_one_plain_process(config, tmp_path):
    result = launch(*HVDLOCAL, "train", str(config))
    assert result.code == 0, result.err
    assert "local-ada on 1 rank" in result.out
    assert records(tmp_path / "out", "end")[0]["collectives"] == 0


def test_horovodrun(config):
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=True).stdout
    # Open MPI 5 does not understand the "-bind-to none" that horovodrun adds by default.
    binding = ["--binding-args=--bind-to none --map-by :OVERSUBSCRIBE"] if "Open MPI) 5" in version else []
    result = launch(shutil.which("horovodrun"), "-np", "2", *binding, *HVDLOCAL, "train", str(config), timeout=180)
    assert result.code == 0, result.err
    assert "local-ada on 2 ranks" in result.out


def test_mpi4py_backend_needs_no_horovod(config, tmp_path):
    """A package named horovod that cannot be imported stands in for one that is not there."""
    hidden = tmp_path / "hidden" / "horovod"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('no Horovod here')")
    without = {"PYTHONPATH": str(hidden.parent)}
    refused = mpirun(2, *HVDLOCAL, "train", str(config), **without)
    assert refused.code == 2
    assert refused.err.count("HVDLOCAL_BACKEND=mpi4py") == 2, "on every rank"
    assert "Traceback" not in refused.err
    result = mpirun(2, *HVDLOCAL, "train", str(config), HVDLOCAL_BACKEND="mpi4py", **without)
    assert result.code == 0, result.err


def test_doctor():
    result = launch(*HVDLOCAL, "doctor", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    assert result.code == 0, result.out
    assert "WRONG" not in result.out
    assert "2 × horovod        an allreduce of two ranks gives the right sum" in result.out
    if re.search(r"\(Open MPI\) [5-9]", result.out):
        assert "ok   survive            one of three ranks was killed, and the other two went on" in result.out


def test_doctor_says_when_horovod_is_missing(tmp_path):
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod" / "__init__.py").write_text("raise ImportError('no Horovod here')")
    env = {
        "PYTHONPATH": f"{tmp_path}:{QUICK_START}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    result = launch(*HVDLOCAL, "doctor", **env)
    assert result.code == 1
    assert "WRONG Horovod            ImportError: no Horovod here" in result.out
    assert "make setup" in result.out
    assert launch(*HVDLOCAL, "doctor", HVDLOCAL_BACKEND="mpi4py", **env).code == 0


@pytest.mark.parametrize(
    ("script", "backend"),
    [("digits_horovod.py", "horovod"), ("digits_hvdlocal.py", "horovod"), ("digits_hvdlocal.py", "mpi4py")],
)
def test_examples(script, backend):
    result = mpirun(2, sys.executable, f"examples/{script}", HVDLOCAL_BACKEND=backend)
    assert result.code == 0, result.err
    accuracy = float(re.search(r"test accuracy ([\d.]+) %", result.out).group(1))
    assert accuracy > 95


def test_the_library_example_differs_in_what_the_readme_says():
    """Initialise, rank and size of the communicator, wrap, synchronise before evaluating."""
    horovod, hvdlocal = (
        (ROOT / "examples" / f"digits_{name}.py").read_text().splitlines() for name in ("horovod", "hvdlocal")
    )
    horovod = [line.replace("hvd.rank()", "comm.rank").replace("hvd.size()", "comm.size") for line in horovod]
    new = [
        line for line in hvdlocal if line not in horovod and line.strip() and '"""' not in line and "print" not in line
    ]
    assert new == [
        "mpirun -np 2 --bind-to none python examples/digits_hvdlocal.py",
        "import hvdlocal",
        "comm = hvdlocal.init()",
        "optimizer = hvdlocal.LocalOptimizer(",
        "    optimizer, model, period=hvdlocal.ConstantPeriod(8), scaling=hvdlocal.LocalAdaScale()",
        ")",
        "optimizer.synchronize()",
    ]
