"""What a user can do wrong: one sentence on every rank, in seconds, before training starts."""

import os
import re
import signal
import subprocess
import time

import pytest
import torch
from support.launch import HVDLOCAL, MPIRUN, ROOT, environment, launch, mpirun

BACKENDS = ["horovod", "mpi4py", "torch"]

# One of each stage of the start; tests/unit/cli has the rest.
MISTAKES = [
    (["--method.presett", "sync"], r"no key 'method.presett': did you mean 'method.preset'\?"),
    (["--data.path", "/nowhere"], r"/nowhere"),
    (["--method.period.period", "0"], r"period=0"),
    (["--data.image_size", "3"], r"digits_cnn cannot take images of 3×3 pixels .*set data.image_size to 4 or more"),
    (["--output", "/proc/run"], r"/proc/run"),
    (["--method.island", "3"], r"island=3 does not divide 2 ranks: give island=\"node\", a number that"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_wrong_settings(config, arguments, message):
    result = mpirun(2, *HVDLOCAL, "train", str(config), *arguments, timeout=60)
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    said = [line for line in result.err.splitlines() if line.startswith("hvdlocal (rank")]
    assert {line[:17] for line in said} == {"hvdlocal (rank 0)", "hvdlocal (rank 1)"}
    assert all(re.search(message, line) for line in said), said


def test_a_missing_and_a_malformed_file(tmp_path):
    result = mpirun(1, *HVDLOCAL, "train", str(tmp_path / "no.yaml"))
    assert result.code == 2
    assert "no.yaml" in result.err
    (tmp_path / "bad.yaml").write_text("data: [1, 2\n")
    result = mpirun(1, *HVDLOCAL, "train", str(tmp_path / "bad.yaml"))
    assert result.code == 2
    assert "Traceback" not in result.err
    result = launch(*HVDLOCAL, "trian")
    assert result.code == 2
    assert "choose one of" in result.err


@pytest.mark.parametrize(
    ("output", "backend"),
    [
        (">/dev/full 2>/dev/full", "horovod"),
        (">&- 2>&-", "horovod"),
        (">&- 2>&-", "mpi4py"),
        ("| head -n 1", "mpi4py"),
    ],
)
def test_output_that_cannot_be_written_does_not_end_a_run(config, tmp_path, output, backend):
    train = f"set -o pipefail; {' '.join(HVDLOCAL)} train {config} --log_every_seconds 0 {output}"
    result = mpirun(2, "bash", "-c", train, HVDLOCAL_BACKEND=backend, PYTHONIOENCODING="ascii")
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "summary.json").exists()


def test_an_earlier_run_is_not_lost(config, tmp_path):
    train = [*HVDLOCAL, "train", str(config), "--epochs", "1"]
    assert mpirun(2, *train).code == 0
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    result = mpirun(2, *train)
    assert result.code == 0, "a batch system may start it again"
    assert "holds this run, finished: nothing to do" in result.out
    result = mpirun(2, *train, "--optimizer.lr", "0.5")
    assert result.code == 2
    assert result.err.count("holds an earlier run with optimizer.lr=0.02, not 0.5") == 2, "on every rank"
    broken = ["--overwrite", "true", "--method.period.period", "0"]
    assert mpirun(2, *train, *broken).code == 2
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before, "a run that cannot start replaces nothing"
    assert mpirun(2, *train, "--overwrite", "true", "--optimizer.lr", "0.5").code == 0
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() != before


def on_rank(rank: int, then: str, otherwise: str) -> list[str]:
    script = f'if [ "${{OMPI_COMM_WORLD_RANK:-$PMI_RANK}}" = {rank} ]; then {then}; else {otherwise}; fi'
    return ["bash", "-c", script]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_setting_that_differs_on_one_rank(config, backend):
    train = f"exec {' '.join(HVDLOCAL)} train {config}"
    result = mpirun(3, *on_rank(1, f"{train} --optimizer.lr 0.5", train), HVDLOCAL_BACKEND=backend, timeout=60)
    assert result.code == 2
    for rank in range(3):
        assert f"hvdlocal (rank {rank}): the ranks do not agree" in result.err
    assert result.err.count("config optimizer.lr: rank 1 has 0.5, rank 0 has 0.02") == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_data_that_is_missing_on_one_rank(config, backend):
    train = f"exec {' '.join(HVDLOCAL)} train {config}"
    result = mpirun(2, *on_rank(1, f"{train} --data.path /elsewhere", train), HVDLOCAL_BACKEND=backend, timeout=60)
    assert result.code == 2
    assert result.err.count("(rank 1 of 2)") == 2


@pytest.mark.parametrize(("preset", "backend"), [("local-ada", "horovod"), ("sync", "mpi4py")])
def test_a_run_that_diverges_leaves_its_last_good_model(config, tmp_path, preset, backend):
    command = [*HVDLOCAL, "train", str(config), "--method.preset", preset, "--optimizer.lr", "1e25"]
    result = mpirun(2, *command, HVDLOCAL_BACKEND=backend, timeout=60)
    assert result.code == 3, result.err
    assert "Traceback" not in result.err
    assert result.err.count("NaN or infinity on rank") == 2
    assert result.err.count("last_good.pt") == 2
    state = torch.load(tmp_path / "out" / "last_good.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())


LIBRARY_SCRIPT = """
import sys, time, torch, hvdlocal
comm = hvdlocal.init(timeout_seconds=20)
model = torch.nn.Linear(2, 2)
optimizer = hvdlocal.LocalOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, period=hvdlocal.ConstantPeriod(2))
print("ready\\n", end="", flush=True)
for i in range(10_000):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    if i == 7 and comm.rank == 1 and sys.argv[1] == "raise":
        raise KeyError("a bug of the user's script on rank 1")
    if i == 7 and comm.rank == 1 and sys.argv[1] == "exit":
        sys.exit(3)
    if sys.argv[1] == "sleep":
        time.sleep(0.05)
    optimizer.step()
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exception_on_one_rank_ends_the_job(tmp_path, backend):
    script = tmp_path / "script.py"
    script.write_text(LIBRARY_SCRIPT)
    result = mpirun(
        2, environment()["PATH"].split(":")[0] + "/python", str(script), "raise", HVDLOCAL_BACKEND=backend, timeout=60
    )
    assert result.code != 0
    assert "a bug of the user's script on rank 1" in result.err


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_leaves_ends_the_job(tmp_path, backend):
    """sys.exit on one rank: no exception that a hook could see, and MPI_Finalize would wait for the others."""
    script = tmp_path / "script.py"
    script.write_text(LIBRARY_SCRIPT)
    result = mpirun(
        2, environment()["PATH"].split(":")[0] + "/python", str(script), "exit", HVDLOCAL_BACKEND=backend, timeout=60
    )
    assert result.code != 0
    assert "'hvdlocal.average' cannot complete, because another rank has left the job" in result.err


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_rank_ends_the_job(tmp_path, backend):
    script = tmp_path / "script.py"
    script.write_text(LIBRARY_SCRIPT + "\n")
    pids = tmp_path / "pids"
    pids.mkdir()
    python = environment()["PATH"].split(":")[0] + "/python"
    job = subprocess.Popen(
        [
            *MPIRUN,
            "-np",
            "2",
            "bash",
            "-c",
            f"echo $$ > {pids}/${{OMPI_COMM_WORLD_RANK:-$PMI_RANK}}; exec {python} {script} sleep",
        ],
        cwd=ROOT,
        env=environment(HVDLOCAL_BACKEND=backend),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert job.stdout is not None
        assert job.stdout.readline().strip() == "ready"
        time.sleep(1)
        os.kill(int((pids / "1").read_text()), signal.SIGKILL)
        job.wait(timeout=40)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
    assert job.returncode != 0
