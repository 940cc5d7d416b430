"""A rank dies, fails, leaves or stops: the job ends in time and says why; started again, it ends with the same numbers."""

from __future__ import annotations

import re
import socket
import time

import pytest
import torch
from support.faults import assert_the_same, seconds_after

pytestmark = pytest.mark.timeout(900)  # a test starts several jobs, each with a deadline of its own

HOST = re.escape(socket.gethostname())

ENDED_SECONDS = 15.0
"""After a rank died, within these all others are out; after one was stopped, they come on top of the timeout."""

TIMEOUT_SECONDS = 4

ERRORS = {
    "kill": "",
    "raise": r"RuntimeError: an exception that a test injects\n(?s:.*)hvdlocal \(rank {rank}\): ended by RuntimeError",
    "memory": rf"hvdlocal \(rank {{rank}}\): rank {{rank}} of 2 on {HOST} cannot go on after step [0-9]+: out of memory",
    "bad_data": rf"hvdlocal \(rank {{rank}}\): rank {{rank}} of 2 on {HOST} cannot go on after .*: an image that cannot",
    "device_memory": rf"hvdlocal \(rank {{rank}}\): rank {{rank}} of 2 on {HOST} cannot go on .*: the GPU is out of memory",
}

DEATHS = {
    "horovod": [
        "kill:computing:1:23",
        "kill:averaging:0:3",
        "kill:checkpointing:1:3",
        "kill:completing:0:2",
        "kill:evaluating:1:2",
        "raise:computing:1:12",
        "bad_data:computing:0:12",
        "memory:averaging:0:2",
        "device_memory:evaluating:1:1",
        "kill:ending:0:1",
    ],
    "mpi4py": ["kill:averaging:1:3", "kill:checkpointing:0:3", "memory:computing:1:12", "raise:evaluating:0:2"],
    "torch": ["kill:averaging:0:3", "kill:checkpointing:1:3", "memory:computing:1:12", "raise:evaluating:0:2"],
}


@pytest.mark.parametrize("backend", DEATHS)
def test_a_run_of_which_ranks_die(make, undisturbed, backend):
    run = make()
    for fault in DEATHS[backend]:
        what, _, rank, _ = fault.split(":")
        result = run.start(fault, HVDLOCAL_BACKEND=backend)
        assert result.code not in (0, 2, 85), fault
        assert seconds_after(result, time.time()) < ENDED_SECONDS, fault
        assert re.search(ERRORS[what].format(rank=rank), result.err), f"{fault}\n{result.err}"
        assert run.checkpoints, "of the steps before"
    assert run.start(HVDLOCAL_BACKEND=backend).code == 0
    assert_the_same(run, undisturbed())


@pytest.mark.parametrize("backend", ["mpi4py", "horovod", "torch"])
def test_a_run_of_which_a_rank_leaves(make, backend):
    """In order, without an error: the others do not call it one, and end with their own code instead of crashing in MPI."""
    run = make()
    for rank in (1, 0, 1):
        result = run.start(f"leave:averaging:{rank}:2", HVDLOCAL_BACKEND=backend)
        assert result.code == 4, result.err
        said = (
            rf"rank {1 - rank} of 2 on {HOST}: the collective '[a-z.]+' cannot complete, because another rank has left"
        )
        assert re.search(said, result.err), result.err
        assert "if it has merely finished, it had fewer steps to do" in result.err
        assert "Segmentation" not in result.err


STOPS = {
    "horovod": ["stop:computing:1:23", "stop:averaging:0:3", "stop:checkpointing:1:3", "stop:evaluating:0:2"],
    "mpi4py": ["stop:averaging:1:3"],
    "torch": ["stop:averaging:0:3"],
}


@pytest.mark.parametrize("backend", STOPS)
def test_a_run_of_which_ranks_hang(make, undisturbed, backend):
    run = make()
    for fault in STOPS[backend]:
        result = run.start(fault, HVDLOCAL_BACKEND=backend, HVDLOCAL_TIMEOUT_SECONDS=str(TIMEOUT_SECONDS))
        assert result.code == 4, f"{fault}\n{result.err}"
        assert seconds_after(result, time.time()) < TIMEOUT_SECONDS + ENDED_SECONDS
        other = 1 - int(fault.split(":")[2])
        said = rf"rank {other} of 2 on {HOST} waited {TIMEOUT_SECONDS} s in the collective 'hvdlocal\.[a-z.]+'"
        assert re.search(said, result.err), f"{fault}\n{result.err}"
    assert run.start(HVDLOCAL_BACKEND=backend).code == 0
    assert_the_same(run, undisturbed())


def test_numbers_lost_on_one_rank(make):
    run = make()
    result = run.start("nan:computing:1:30")
    assert result.code == 3, result.err
    assert result.err.count("NaN or infinity on rank 1") == 2, "on every rank"
    state = torch.load(run.output / "last_good.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())
