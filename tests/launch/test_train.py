"""`hvdlocal train` under every launcher and with every method."""

import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from support.launch import HVDLOCAL, ROOT, launch, mpirun

from hvdlocal.models import build_model

PRESETS = ["sync", "local", "acc-lin", "acc-ada", "local-lin", "local-ada", "local-ada-nostale"]


def records(directory, kind=None):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_learns(config, tmp_path, preset):
    result = mpirun(2, *HVDLOCAL, "train", str(config), "--method.preset", preset, "--method.period.period", "2")
    assert result.code == 0, result.err
    assert f"{preset} on 2 ranks" in result.out
    end = records(tmp_path / "out", "end")[0]
    assert end["evaluation"]["samples"] == 31, "every test image once"
    assert end["evaluation"]["accuracy"] == 1.0
    assert end["scale_invariant_epochs"] == pytest.approx(6, abs=0.7)
    micro_batches = 2 if preset.startswith("acc") else 1
    assert end["data_epochs"] == pytest.approx(end["steps"] * micro_batches * 2 * 8 / 96)
    per_round = {"sync": 1, "acc-lin": 2, "acc-ada": 2}.get(preset, 2)  # steps or micro-batches between collectives
    collectives = end["steps"] * micro_batches / per_round * (2 if preset == "local-ada-nostale" else 1)
    assert end["collectives"] == pytest.approx(collectives, abs=1)
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    build_model("digits_cnn", 3, (8, 8, 1)).load_state_dict(state)


def test_metrics_hold_what_a_reader_needs(config, tmp_path):
    assert mpirun(2, *HVDLOCAL, "train", str(config), "--log_every_seconds", "0").code == 0
    steps, rounds = records(tmp_path / "out", "steps"), records(tmp_path / "out", "round")
    needed = {
        "step",
        "progress",
        "epoch",
        "loss",
        "accuracy",
        "lr",
        "gain",
        "period",
        "grad_sqr",
        "grad_var",
        "divergence",
    }
    needed |= {"computing_seconds", "averaging_seconds", "waiting_for_data_seconds", "bytes_sent"}
    assert needed <= set(steps[-1])
    assert [r["round"] for r in rounds] == list(range(1, len(rounds) + 1))
    assert all(r["divergence"] > 0 and r["grad_var"] > 0 for r in rounds)
    sent = [r["bytes_sent"] for r in rounds]
    assert len({after - before for before, after in pairwise(sent)}) == 1, "the same in every round"
    spent = [steps[-1][f"{name}_seconds"] for name in ("computing", "averaging", "waiting_for_data", "evaluating")]
    assert sum(spent) == pytest.approx(steps[-1]["elapsed_seconds"])
    resolved = (tmp_path / "out" / "config.yaml").read_text()
    assert "momentum: local" in resolved
    told = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert told["ranks"] == 2
    assert len(told["hosts"]) == 2


def test_a_run_can_be_repeated_from_its_resolved_configuration(config, tmp_path):
    first = mpirun(2, *HVDLOCAL, "train", str(config))
    again = mpirun(2, *HVDLOCAL, "train", str(tmp_path / "out" / "config.yaml"), "--output", str(tmp_path / "again"))
    assert (first.code, again.code) == (0, 0), again.err
    one, two = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("out", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one), "bit for bit"


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


@pytest.mark.parametrize(
    "settings",
    [
        ["--optimizer.name", "adamw", "--optimizer.lr", "0.003", "--method.momentum", "average"],
        ["--method.period.rule", "qsr", "--method.period.alpha", "0.03", "--method.period.h_base", "2"],
        ["--method.preset", "local", "--method.period.rule", "post-local", "--method.period.switch_epochs", "3"],
        ["--method.period.rule", "adacomm", "--method.period.max_period", "16", "--method.accumulate", "2"],
        ["--method.buffers", "reestimate", "--method.momentum", "reset", "--method.statistics", "exact"],
        [
            "--precision",
            "bfloat16",
            "--model.channels_last",
            "true",
            "--label_smoothing",
            "0.1",
            "--optimizer.max_norm",
            "5",
        ],
        [
            "--schedule.name",
            "step",
            "--schedule.step_epochs",
            "2",
            "--schedule.warmup_epochs",
            "1",
            "--data.flip",
            "true",
        ],
        ["--data.tail", "partial", "--data.order", "block", "--data.storage", "stream", "--data.threads", "2"],
        ["--data.mixup", "0.2", "--data.image_size", "8", "--data.min_area", "0.5", "--data.share", "job"],
    ],
    ids=[
        "adamw",
        "qsr",
        "post-local",
        "adacomm-accumulate",
        "reestimate-reset-exact",
        "bfloat16",
        "step",
        "streamed",
        "mixup",
    ],
)
def test_settings(config, tmp_path, settings):
    result = mpirun(2, *HVDLOCAL, "train", str(config), *settings)
    assert result.code == 0, result.err
    assert records(tmp_path / "out", "end")[0]["evaluation"]["accuracy"] > 0.9


def test_doctor():
    result = launch(*HVDLOCAL, "doctor", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    assert result.code == 0, result.out
    assert "WRONG" not in result.out
    assert "2 × horovod        an allreduce of two ranks gives the right sum" in result.out


def test_doctor_says_when_horovod_is_missing(tmp_path):
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod" / "__init__.py").write_text("raise ImportError('no Horovod here')")
    env = {"PYTHONPATH": str(tmp_path), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
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
