"""How ranks end, how the others notice it, and what the launcher tells of the job."""

from __future__ import annotations

import re
import sys

import pytest
from support.faults import none_left
from support.launch import MPIRUN, Result, launch

BEGINNING = """
import os, signal, sys, time
import torch, hvdlocal
from hvdlocal.communicator import CommunicationError, LaunchError, TooFewRanksError

def say(text):
    sys.stderr.write(f"{text}\\n")

def die(signal=signal.SIGKILL):
    os.kill(os.getpid(), signal)

say(f"process {os.getpid()}")
"""

JOINING = """
communicator = hvdlocal.init(backend="mpi4py", survive=True)
own = communicator.rank

def total():
    x = torch.tensor([2.0**own])
    communicator.sum_(x, "test.sum")
    return x.item()
"""


REFUSED = """
try:
    hvdlocal.init(backend="mpi4py", survive=True)
except LaunchError as error:
    say(f"LaunchError: {error}")
    time.sleep(5)  # mpirun ends the slower rank when the first one ends
    sys.exit(1)
"""


def start(ranks: int, program: str, *, joining: str = JOINING, ulfm: bool = True, **settings: str) -> Result:
    """Runs a program on so many ranks; afterwards none of their processes is left."""
    options = ["--with-ft", "ulfm"] if ulfm else []
    command = [*MPIRUN, *options, "-np", str(ranks), sys.executable, "-c", BEGINNING + joining + program]
    result = launch(*command, **settings)
    processes = [int(pid) for pid in re.findall("process ([0-9]+)", result.err)]
    assert len(processes) == ranks
    assert none_left(processes)
    return result


def test_at_the_beginning_and_at_the_end():
    """Rank 0 dies before the first collective, and rank 2 after the last; the exit code is that of the others."""
    program = """
if own == 0:
    die()
say(f"sum {total()} of {communicator.size}")
if own == 2:
    die()
sys.exit(7)
"""
    result = start(4, program)
    assert result.code == 7, result.err
    assert result.err.count("sum 14.0 of 3") == 3, result.err


def test_an_exception_ends_one_rank():
    program = """
if own == 0:
    raise KeyError("only here")
say(f"sum {total()} of {communicator.size}")
"""
    result = start(3, program)
    assert result.code == 0, result.err
    assert result.err.count("KeyError: 'only here'") == 1
    assert "rank 0 of 3 on " in result.err
    assert "uncaught KeyError; the other ranks go on without this one" in result.err
    assert result.err.count("sum 6.0 of 2") == 2


def test_an_exception_on_all_ranks_ends_the_job():
    """Also where the ranks have gone on without one that had it before."""
    program = """
if own:
    total()
raise KeyError("sooner or later")
"""
    result = start(3, program)
    assert result.code == 1, result.err
    assert result.err.count("KeyError: 'sooner or later'") == 3


def test_an_exception_on_all_ranks_that_are_left():
    """Nobody must take the job for one that has finished: of ranks that call MPI_Abort after a loss, mpirun makes a code of 0."""
    program = """
if own:
    die()
total()
raise KeyError("after the loss")
"""
    result = start(2, program)
    assert result.code == 1, result.err
    assert result.err.count("KeyError: 'after the loss'") == 1


def test_different_collectives():
    program = """
try:
    communicator.gather(1, "test.gather") if own == 1 else total()
except CommunicationError as error:
    say(error)
    sys.exit(7)
"""
    result = start(3, program)
    assert result.code == 7, result.err
    sums = [f"rank {rank}: sum of 1 torch.float32 (test.sum)" for rank in (0, 2)]
    told = (
        f"the ranks ask for different collectives at the same time, {sums[0]}; rank 1: gather (test.gather); {sums[1]})"
    )
    assert result.err.count(told) == 3, result.err


def test_a_rank_that_ends_before_the_others():
    result = start(2, "own or total()")
    assert result.code in (1, 4), result.err
    assert "rank 0: sum of 1 torch.float32 (test.sum); rank 1: the end of the program" in result.err


def test_ranks_that_hang():
    """One is stopped as it comes to a collective; one is stopped in it; one works for ever. Those that wait are not to blame."""
    program = """
communicator.timeout_seconds, communicator._board._patience = 12, 6
total()
if own == 0:
    die(signal.SIGSTOP)
if own == 1:
    while True:
        time.sleep(1)
if own == 3:
    communicator._agree_on = lambda what: die(signal.SIGSTOP)
say(f"sum {total()} of {communicator.size}")
"""
    result = start(5, program)
    assert result.code == 0, result.err
    assert result.err.count("sum 20.0 of 2") == 2, result.err
    for rank in (0, 1, 3):
        assert re.search(rf"waited [0-9]+ s in the collective 'test.sum' for rank {rank} and killed it", result.err)


@pytest.mark.parametrize(("answer", "code"), [("sys.exit(3)", 85), ("communicator.abort(9)", 9)], ids=["exit", "abort"])
def test_a_rank_that_can_be_neither_reached_nor_killed(answer, code):
    """As one alone on its node: the job ends, and the tensor is what it was."""
    program = f"""
communicator.timeout_seconds = 1.5
communicator._board.kill_hung = lambda *arguments: []
if own == 1:
    die(signal.SIGSTOP)
x = torch.ones(3)
try:
    communicator.sum_(x, "test.sum")
except TooFewRanksError as error:
    say(f"{{error}}; {{x.tolist()}}")
    {answer}
"""
    result = start(2, program)
    assert result.code == code, result.err
    assert re.search(
        r"rank 0 of 2 on .* waited 3 s in the collective 'test.sum': ranks do not answer, .*; \[1.0, 1.0, 1.0\]",
        result.err,
    )


def test_killed_before_mpi_has_started():
    """MPI waits for all ranks then, and cannot be interrupted."""
    result = start(
        2, "", joining='os.environ["OMPI_COMM_WORLD_RANK"] == "1" and die()' + JOINING, HVDLOCAL_TIMEOUT_SECONDS="4"
    )
    assert result.code == 1, result.err
    assert "Timeout (0:00:04)!" in result.err
    assert "in start_mpi" in result.err


def test_without_ulfm():
    """Every rank says what is missing."""
    result = start(2, "", joining=REFUSED, ulfm=False)
    assert result.code == 1, result.err
    assert (
        result.err.count(
            "LaunchError: survive needs an mpirun that does not end the job when a rank dies: start the ranks"
        )
        == 2
    )


def test_mpi_that_was_started_already():
    result = start(2, "", joining="from mpi4py import MPI" + REFUSED)
    assert result.code == 1, result.err
    assert result.err.count("LaunchError: survive needs components of MPI that are chosen when it starts") == 2


def test_once_more():
    """After `shutdown` the ranks are joined again, unless some of them have died."""
    program = """
for round in range(2):
    communicator.shutdown()
    communicator = hvdlocal.init(backend="mpi4py", survive=True)
    say(f"sum {total()}")
if own == 1:
    die()
total()
communicator.shutdown()
try:
    hvdlocal.init(backend="mpi4py", survive=True)
except RuntimeError as error:
    say(error)
"""
    result = start(3, program)
    assert result.code == 0, result.err
    assert result.err.count("sum 7.0") == 6
    assert result.err.count("ranks have died, and MPI cannot join those that are left again") == 2
