"""A command imports only what it needs: torch alone takes seconds, and every user waits for them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

HEAVY = ("cv2", "horovod", "jinja2", "matplotlib", "mpi4py.MPI", "scipy", "torch", "torchvision")

RUN = """
import contextlib, io, json, sys
from hvdlocal.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    code = main(sys.argv[1].split())
    assert code == int(sys.argv[2]), code
print(json.dumps(sorted(sys.modules)))
"""


def imported(command: str, code: int = 0) -> set[str]:
    """Returns the modules that a process has imported after a command that ends with this code."""
    program = [sys.executable, "-c", RUN, command, str(code)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        *(
            f"{name} --help"
            for name in ("train", "plan", "advise", "doctor", "report", "figures", "reproduce", "slurm", "finished")
        ),
        "plan experiments/digits.yaml --workers 4 --samples 1000 --no-bytes",
        "slurm --template cpu experiments/digits.yaml",
    ],
)
def test_nothing_heavy_is_imported(command):
    assert imported(command).isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "command",
    [
        "trian experiments/digits.yaml",
        "train missing.yaml",
        "train experiments/digits.yaml --epocs 3",
        "train experiments/digits.yaml --epochs many",
        "advise missing.yaml",
        "plan missing.yaml --workers 2",
        "reproduce table5",
    ],
)
def test_a_mistake_is_reported_before_anything_heavy_is_imported(command):
    assert imported(command, code=2).isdisjoint(HEAVY)


def test_the_overview_imports_next_to_nothing():
    assert imported("--help").isdisjoint({*HEAVY, "jsonargparse", "yaml", "numpy", "h5py", "tqdm"})
