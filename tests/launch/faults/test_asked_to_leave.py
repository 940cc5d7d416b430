"""Signals, the end of the time, and another number of ranks: the run goes on where it was."""

from __future__ import annotations

import json
import signal
import time
from itertools import pairwise

import pytest
from support.faults import Run, assert_the_same
from support.launch import Result
from support.records import records

pytestmark = pytest.mark.timeout(900)  # a test starts several jobs, each with a deadline of its own

LONG_ROUNDS = ("--method.period.period", "50")

# A start polls at its steps 1, 2, 3, 5 and 9 whatever their speed, so it hears of these before the ninth.
REQUESTS = {
    "usr2:computing:1:3": "SIGUSR2 on rank 1",
    "usr1:computing:0:3": "SIGUSR1 on rank 0",
    "term:computing:1:3": "SIGTERM on rank 1",
    "usr2:starting:1:1": "SIGUSR2 on rank 1",
    "term:opening:0:1": "SIGTERM on rank 0",
}


def assert_interrupted(run: Run, result: Result, reason: str) -> None:
    """By a checkpoint of this very step, inside a round."""
    assert result.code == 85, result.err
    assert "Traceback" not in result.err
    step = run.checkpoints[-1]
    assert f"interrupted after step {step}: {reason}. The checkpoint is in " in result.out
    manifest = json.loads((run.output / f"checkpoints/step-{step:010}/manifest.json").read_text())
    assert manifest["in_sync"] is False


def test_a_run_that_is_asked_to_leave(make, undisturbed, tmp_path):
    run = make(*LONG_ROUNDS)
    for fault, reason in REQUESTS.items():
        assert_interrupted(run, run.start(fault), reason)

    with run.started(f"wait={tmp_path}/never:computing:0:3") as process:
        process.send_signal(signal.SIGUSR2)  # mpirun passes it on
        assert process.wait() == 85

    before = run.arguments
    run.arguments += ("--time_limit_minutes", "0.01")
    assert_interrupted(run, run.start(), "the time is over")
    run.arguments = before
    assert_interrupted(run, run.start(SLURM_JOB_END_TIME=str(int(time.time()) + 5)), "the time is over")

    run.arguments += ("--time_limit_minutes", "1000")
    assert run.start(SLURM_JOB_END_TIME=str(int(time.time()) + 10_000)).code == 0
    assert_the_same(run, undisturbed(*LONG_ROUNDS))


def test_another_number_of_ranks(make):
    """Each goes on with the average of the last, and with the images that are next."""
    run = make(*LONG_ROUNDS)
    samples = [0]
    for before, ranks in pairwise([None, 3, 2, 1, 2]):
        run.ranks = ranks
        last = ranks == 2 and before == 1
        result = run.start(*([] if last else ["usr2:computing:0:3"]))
        if last:
            assert result.code == 0, result.err
        else:
            assert_interrupted(run, result, "SIGUSR2 on rank 0")
        assert before is None or f", averaged over the {before} rank" in result.out
        steps = records(run.output, "steps")
        assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
        samples += [samples[-1] + ranks * 8 * i for i in range(1, len(steps) + 2 - len(samples))]
        assert [record["data_epoch"] * 96 for record in steps] == pytest.approx(samples[1:])
    assert records(run.output)[-1]["evaluation"]["accuracy"] > 0.9
