"""What a job that survives needs, repeating a collective among the survivors, and ranks that hang."""

# ruff: noqa: N802  (functions are called as those of MPI)

from __future__ import annotations

import os
import signal
import subprocess
import time
import types

import numpy as np
import pytest

from hvdlocal.communicator import LaunchError, launch, ulfm
from hvdlocal.communicator.hung_ranks import SLOT, NodeBoard
from hvdlocal.communicator.losses import Loss
from hvdlocal.communicator.message_memory import MessageMemory
from hvdlocal.communicator.survivors import Peers, Survivors
from hvdlocal.communicator.threaded import DifferentCollectivesError

LAUNCHED = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "RANK", "WORLD_SIZE", ulfm.FAULT_TOLERANCE]


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch):
    for name in [
        *LAUNCHED,
        ulfm.TRANSPORT,
        ulfm.COLLECTIVES,
        "HVDLOCAL_SURVIVE",
        "HVDLOCAL_BACKEND",
        "HVDLOCAL_ISLAND",
    ]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "_current", None)


# -- What it needs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "horovod", "torch"])
def test_other_engines(monkeypatch, backend):
    told = f"survive needs the engine mpi4py, but {backend or 'horovod'} is chosen: set HVDLOCAL_BACKEND=mpi4py"
    with pytest.raises(ValueError, match=told):
        launch.init(backend, survive=True)
    monkeypatch.setenv("HVDLOCAL_SURVIVE", "1")
    with pytest.raises(ValueError, match=told):
        launch.init(backend)


@pytest.mark.parametrize("text", ["yes", "True", "2"])
def test_the_variable(monkeypatch, text):
    monkeypatch.setenv("HVDLOCAL_SURVIVE", text)
    with pytest.raises(ValueError, match=f"HVDLOCAL_SURVIVE='{text}': set it to 1 or 0"):
        launch.init("mpi4py")


def test_the_argument_decides(monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "_mpi4py", lambda timeout, survive: asked.append(survive) or 1 / 0)
    for variable, argument in [("1", False), ("0", True), ("1", None), ("0", None), ("", None)]:
        monkeypatch.setenv("HVDLOCAL_SURVIVE", variable)
        with pytest.raises(ZeroDivisionError):
            launch.init("mpi4py", survive=argument)
    assert asked == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "survive needs ranks of Open MPI, but torchrun has started this one"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "survive needs Open MPI's own launcher, but srun has started this rank"),
        (
            {"PMI_SIZE": "2"},
            "survive needs Open MPI 5.0 or newer, but the launcher of another MPI has started this rank",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "survive needs an mpirun that does not end the job when a rank dies"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", ulfm.FAULT_TOLERANCE: "0"},
            "survive needs an mpirun that does not end the job when a rank dies",
        ),
    ],
)
def test_launchers(monkeypatch, variables, told):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=f"{told}.* start the ranks with `mpirun --with-ft ulfm`$"):
        ulfm._check_launcher()


def test_launchers_that_will_do(monkeypatch):
    ulfm._check_launcher()  # a plain process
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    ulfm._check_launcher()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # of the daemons of mpirun
    monkeypatch.setenv(ulfm.FAULT_TOLERANCE, "1")
    ulfm._check_launcher()


def library(vendor="Open MPI", version=(5, 0, 8), calls=("Shrink",), started=False):
    """A stand-in of mpi4py.MPI."""
    communicator = type("Comm", (), dict.fromkeys(calls))
    return types.SimpleNamespace(
        get_vendor=lambda: (vendor, version), Comm=communicator, Is_initialized=lambda: started
    )


@pytest.mark.parametrize(
    ("mpi", "told"),
    [
        (
            library("MPICH", (4, 2, 1)),
            r"needs Open MPI 5\.0 or newer, but mpi4py uses MPICH 4\.2\.1: install mpi4py for such",
        ),
        (library(version=(4, 1, 6)), r"needs Open MPI 5\.0 or newer, but mpi4py uses Open MPI 4\.1\.6"),
        (library(calls=()), r"survive needs mpi4py 4\.1 or newer"),
        (
            library(started=True),
            r"has been started already: call hvdlocal\.init\(survive=True\) before anything imports",
        ),
    ],
)
def test_libraries(mpi, told):
    with pytest.raises(LaunchError, match=told):
        ulfm._check_library(mpi)


def test_a_library_that_will_do():
    ulfm._check_library(library())


def test_components(monkeypatch):
    """Those that cannot lose a rank are excluded beside what the user excludes; what the user asks for is kept or refused."""
    assert ulfm.components() == {ulfm.TRANSPORT: "ob1", ulfm.COLLECTIVES: "^cuda,han,hcoll,portals4"}
    monkeypatch.setenv(ulfm.TRANSPORT, "ob1")
    monkeypatch.setenv(ulfm.COLLECTIVES, "^ucc,hcoll")
    assert ulfm.components() == {ulfm.TRANSPORT: "ob1", ulfm.COLLECTIVES: "^ucc,hcoll,cuda,han,portals4"}
    monkeypatch.setenv(ulfm.COLLECTIVES, "basic,libnbc,ftagree")
    assert ulfm.components()[ulfm.COLLECTIVES] == "basic,libnbc,ftagree"
    monkeypatch.setenv(ulfm.COLLECTIVES, "tuned,han,basic")
    with pytest.raises(LaunchError, match=r"OMPI_MCA_coll=tuned,han,basic .* asks for han: leave that out"):
        ulfm.components()
    monkeypatch.setenv(ulfm.TRANSPORT, "ucx")
    with pytest.raises(LaunchError, match=r"survive needs the transport ob1, but OMPI_MCA_pml=ucx .*: leave that out"):
        ulfm.components()


# -- Repeating a collective -------------------------------------------------------------------------------------------


class MPIError(RuntimeError):
    """In place of MPI's exception."""


class Ranks:
    """A stand-in of MPI's communicator of ranks of a job, of which the tests say what its calls answer.

    Attributes:
        shrinks: what `Shrink` answers in order: other ranks, or None if it fails.
        agreements: what `Agree` answers in order; None if it fails, as it does with a death that nobody has noticed.
        agreed: what this rank has said to the agreements.
        splits: what `Split` answers in order.
        colours: what this rank has said to the splits.
    """

    rank = 0

    def __init__(self, numbers, shrinks=(), agreements=(), splits=()):
        self.splits, self.colours = list(splits), []
        self.numbers, self.size, self.shrinks, self.agreements = numbers, len(numbers), list(shrinks), list(agreements)
        self.agreed, self.revoked = [], False

    def Get_group(self):
        return self

    def Translate_ranks(self, places, job):
        return [job.numbers.index(self.numbers[place]) for place in places]

    def Set_errhandler(self, handler):
        assert handler == "return"

    def Revoke(self):
        self.revoked = True

    def Ack_failed(self):
        assert self.revoked

    def Shrink(self):
        return self._next(self.shrinks)

    def Split(self, colour):
        self.colours.append(colour)
        return self._next(self.splits)

    def Agree(self, flag):
        self.agreed.append(flag)
        return self._next(self.agreements)

    def _next(self, answers):
        answer = answers.pop(0)
        if answer is None:
            raise MPIError
        return answer


MPI = types.SimpleNamespace(Exception=MPIError, ERRORS_RETURN="return", UNDEFINED="none")
HOSTS = ["n0", "n0", "n1", "n1"]


class LeftError(Exception):
    """In place of the end of this process."""


def leave(dead, others):
    raise LeftError(dead, others)


def survivors(ranks):
    return Survivors(MPI, ranks, HOSTS, leave)


def attempts(*outcomes):
    """A collective whose attempts have these outcomes."""
    rest = list(outcomes)

    def attempt():
        outcome = rest.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return attempt


def test_nobody_dies():
    ranks = Ranks([0, 1, 2, 3], agreements=[1])
    job = survivors(ranks)
    assert job.complete("c", attempts("sum")) == "sum"
    assert (job.members, job.losses, ranks.agreed, ranks.revoked) == ((0, 1, 2, 3), [], [1], False)


@pytest.mark.parametrize("outcome", [MPIError(), "sum"], ids=["here too", "elsewhere"])
def test_it_is_repeated_where_it_has_failed(outcome):
    left = Ranks([0, 3], agreements=[1])
    ranks = Ranks([0, 1, 2, 3], shrinks=[left], agreements=[0, 1])
    job = survivors(ranks)
    assert job.complete("c", attempts(outcome, "sum of two")) == "sum of two"
    assert job.losses == [Loss((1, 2), ("n0", "n1"), 2, "c")]
    assert (job.ranks, job.members) == (left, (0, 3))
    assert ranks.agreed == [int(outcome == "sum"), 1]
    assert [job.place_of(rank) for rank in (0, 1, 3)] == [0, 0, 1]


def test_deaths_one_after_another_and_during_the_recovery():
    """The second rank dies while the survivors connect: on this rank that fails, and once more on another one."""
    last = Ranks([3], agreements=[1])
    two = Ranks([2, 3], shrinks=[last], agreements=[None, 1])
    ranks = Ranks([0, 1, 2, 3], shrinks=[None, Ranks([1, 2, 3]), two], agreements=[0, 0, 0, 1])
    job = survivors(ranks)
    assert job.complete("c", attempts(MPIError(), "sum of two", "own")) == "own"
    assert ranks.agreed == [0, 0, 1, 1]
    assert [(loss.ranks, loss.remaining) for loss in job.losses] == [((0, 1), 2), ((2,), 1)]


@pytest.mark.parametrize("outcome", [MPIError("truncated"), "sum"], ids=["here", "elsewhere"])
def test_a_failure_without_a_death_is_one(outcome):
    same = Ranks([0, 1, 2, 3])
    job = survivors(Ranks([0, 1, 2, 3], shrinks=[same], agreements=[0, 1]))
    with pytest.raises(
        RuntimeError, match="truncated" if isinstance(outcome, MPIError) else "it failed on another rank"
    ):
        job.complete("c", attempts(outcome))
    assert (job.ranks, job.losses) == (same, [])


def test_different_collectives():
    """They are an answer if all ranks have it, and an attempt that failed if a rank died meanwhile."""
    left = Ranks([0, 1, 2], agreements=[1, 1])
    job = survivors(Ranks([0, 1, 2, 3], shrinks=[left], agreements=[0, 1]))
    assert job.complete("c", attempts(DifferentCollectivesError("of the dead"), "sum")) == "sum"
    with pytest.raises(DifferentCollectivesError, match="of all"):
        job.complete("c", attempts(DifferentCollectivesError("of all")))


def test_a_repetition_receives_in_other_memory():
    """A message that comes in late does not overwrite it."""
    left = Ranks([0, 1], agreements=[1])
    job = survivors(Ranks([0, 1, 2], shrinks=[left], agreements=[0, 1]))
    received = []

    def attempt():
        received.append(job.messages.take(8))
        received[-1][:] = len(received)
        if len(received) == 1:
            raise MPIError
        received[0][:] = 100  # late
        return received[-1].tolist()

    assert job.complete("c", attempt) == [2] * 8


def test_memory_of_a_collective_that_failed_is_neither_used_again_nor_freed():
    """MPI may still write to it."""
    memory = MessageMemory()
    small, large = memory.take(10), memory.take(1000)
    memory.reuse()
    assert np.shares_memory(memory.take(10), large)
    assert not np.shares_memory(memory.take(10), small)
    larger = memory.take(2000)
    memory.abandon()
    assert not any(np.shares_memory(memory.take(10), one) for one in (large, larger))
    assert any(np.shares_memory(kept, large) for kept in memory._abandoned)
    assert any(np.shares_memory(kept, larger) for kept in memory._abandoned)


@pytest.mark.parametrize("error", [ValueError("garbage"), MemoryError()])
def test_what_was_received_may_be_anything(error):
    """MPI does not always raise; a rank that cannot make sense of what it got is one that has failed."""
    left = Ranks([0, 1], agreements=[1])
    ranks = Ranks([0, 1, 2], shrinks=[left], agreements=[0, 1])
    assert survivors(ranks).complete("c", attempts(error, "sum")) == "sum"
    assert ranks.agreed == [0, 1]


# -- Islands that leave ------------------------------------------------------------------------------------------------

ISLANDS = [[0, 1], [2, 3]]


def in_islands(alive, goes_on=None, peers=None, agreements=(0, 1)):
    """All ranks of a job in two islands, of which these are alive after a collective, and this rank's island."""
    shrunk = Ranks(alive, splits=[goes_on or Ranks([])])
    if goes_on:
        goes_on.splits = [peers]
    inside = Ranks([0, 1])
    ranks = Ranks([0, 1, 2, 3], shrinks=[shrunk], agreements=agreements, splits=[inside, Ranks([0, 2])])
    job = survivors(ranks)
    job.islands = ISLANDS
    island = job.divide()
    assert (ranks.colours, island.ranks, island.members) == ([0, 0], inside, (0, 1))
    return job, island, shrunk


def test_an_island_leaves_as_a_whole():
    """Rank 3 goes with rank 2, although it is alive; the peers are connected anew."""
    left, alone = Ranks([0, 1], agreements=[1]), Ranks([0])
    job, _, shrunk = in_islands([0, 1, 3], left, alone)
    before = job.peers
    assert Peers(job).members == (0, 2)
    assert Peers(job).complete("c", attempts(MPIError(), "sum of one")) == "sum of one"
    assert before.revoked, "so that peers do not wait in it"
    assert shrunk.colours == left.colours == [0]
    assert job.losses == [Loss((2, 3), ("n1", "n1"), 2, "c")]
    assert (job.members, job.ranks, Peers(job).ranks, Peers(job).members) == ((0, 1), left, alone, (0,))


def test_a_death_while_the_islands_are_connected():
    """A rank that has not come to `divide` yet connects the survivors as those do that have: in islands."""
    left, alone, inside = Ranks([0, 1], agreements=[1]), Ranks([0]), Ranks([0, 1])
    shrunk = Ranks([0, 1, 3], splits=[left])
    left.splits = [alone, inside, alone]
    job = survivors(Ranks([0, 1, 2, 3], shrinks=[shrunk], agreements=[0, 1]))
    job.islands = ISLANDS

    def attempt():
        if job.members == (0, 1, 2, 3):
            raise MPIError
        return job.divide()

    assert job.complete("c", attempt).ranks is inside
    assert (shrunk.colours, left.colours) == ([0], [0, 0, 0])
    assert job.members == (0, 1)


@pytest.mark.parametrize("second", [False, True], ids=["the survivors", "their peers"])
def test_a_death_while_survivors_in_islands_are_connected(second):
    """The ranks on which a call has not failed would wait in it, and not come to the agreement."""
    left, alone, half = Ranks([0, 1], agreements=[1]), Ranks([0]), Ranks([0, 1], splits=[None])
    left.splits = [alone]
    failed, shrunk = Ranks([0, 1, 3], splits=[half if second else None]), Ranks([0, 1], splits=[left])
    job = survivors(Ranks([0, 1, 2, 3], shrinks=[failed, shrunk], agreements=[0, 0, 1]))
    job.islands = ISLANDS
    assert job.complete("c", attempts(MPIError(), "sum")) == "sum"
    assert (failed.revoked, half.revoked, left.revoked) == (True, second, False)
    assert (job.ranks, job.peers) == (left, alone)


@pytest.mark.parametrize(("alive", "others"), [([0, 2, 3], True), ([0, 2], False)])
def test_this_rank_leaves_with_its_island(alive, others):
    job, _, shrunk = in_islands(alive)
    with pytest.raises(LeftError) as left:
        job.complete("c", attempts("sum"))
    assert left.value.args == ([1], others)
    assert shrunk.colours == ["none"]


def test_a_death_inside_of_this_island():
    """The others of the island see it in a collective of their own: no agreement, and nothing is repeated."""
    job, island, _ = in_islands([0, 1, 2, 3])
    assert island.complete("c", attempts("mean")) == "mean"
    assert [island.place_of(rank) for rank in (0, 1)] == [0, 1]
    island.ranks.Get_failed = lambda: Ranks([1])
    with pytest.raises(LeftError) as left:
        island.complete("c", attempts(MPIError()))
    assert left.value.args == ([1], True)
    assert island.ranks.revoked
    job.members = (0, 1)
    with pytest.raises(LeftError) as left:
        island.complete("c", attempts(MPIError()))
    assert left.value.args == ([1], False)


# -- Ranks that hang --------------------------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path):
    """The boards of four ranks of a node, and a process of each but the first."""
    file = tmp_path / "board"
    file.write_bytes(bytes(4 * SLOT.itemsize))
    boards = [NodeBoard(file, place, 4, patience=60) for place in range(4)]
    processes = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    for place, process in enumerate(processes, 1):
        boards[place]._mine["pid"] = process.pid
    yield boards, processes
    for board in boards:
        board.close()
    for process in processes:
        process.kill()
        process.wait()


def test_ranks_that_are_behind_are_killed_unless_they_wait(node):
    boards, processes = node
    for board, collectives in zip(boards, (3, 3, 2, 1), strict=True):
        assert [board.enter(inside=False) for _ in range(collectives)] == list(range(1, collectives + 1))
    with boards[2].waiting():
        assert boards[0].kill_hung([1, 2, 3], 3, inside=False) == [3]
        assert processes[2].wait() == -signal.SIGKILL
        assert boards[0].kill_hung([1, 2], 2, inside=False) == []
    assert [process.poll() for process in processes[:2]] == [None, None]
    assert boards[0].kill_hung([1, 2], 3, inside=False) == [2], "it waits no longer"
    assert processes[1].wait() == -signal.SIGKILL
    assert boards[0].kill_hung([2, 3], 3, inside=False) == [2, 3], "to kill one that has ended is no mistake"


def test_collectives_inside_of_an_island_are_counted_apart(node):
    boards, processes = node
    entered = [board.enter(inside=True) for board in (boards[0], boards[0], boards[1], boards[2], boards[2])]
    assert entered == [1, 2, 1, 1, 2]
    assert [board.enter(inside=False) for board in boards] == [1] * 4
    assert boards[0].kill_hung([1, 2, 3], 1, inside=False) == []
    assert boards[0].kill_hung([1, 2], 2, inside=True) == [1]
    assert processes[0].wait() == -signal.SIGKILL


def test_ranks_that_do_not_run_are_killed_wherever_they_are(node):
    boards, processes = node
    for board in boards:
        board.enter(inside=False)
        board.close()
    boards[1]._mine["beat"] = time.monotonic() - 61
    boards[2]._mine["beat"] = time.monotonic() - 59
    with boards[1].waiting():
        assert boards[0].kill_hung([1, 2, 3], 1, inside=False) == [1]
    assert processes[0].wait() == -signal.SIGKILL


def test_a_rank_that_runs_shows_it(tmp_path):
    file = tmp_path / "board"
    file.write_bytes(bytes(SLOT.itemsize))
    board = NodeBoard(file, 0, 1, patience=0.04)
    before = float(board._mine["beat"][0])
    deadline = time.monotonic() + 60
    while float(board._mine["beat"][0]) == before:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    board.close()
    assert int(board._mine["pid"][0]) == os.getpid()
