"""A rank that dies before the others can go on without it: the job ends, and a batch script starts it again."""

import sys

from support.launch import MPIRUN, launch

PROGRAM = """
import os, signal, sys
from hvdlocal.cli import main
from hvdlocal.communicator import surviving_backend
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    surviving_backend.open_board = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(main(["train", sys.argv[1], "--survive", "true"]))
"""


def test_while_the_ranks_are_joined(config):
    command = [*MPIRUN, "--with-ft", "ulfm", "-np", "3", sys.executable, "-c", PROGRAM, str(config)]
    result = launch(*command, timeout=240, HVDLOCAL_BACKEND="mpi4py")
    assert result.code == 4, result.err
    assert "a rank died while the ranks of this job were joined" in result.err
    assert "start it again" in result.err
    assert "Traceback" not in result.err
