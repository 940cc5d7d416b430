"""A rank dies, or is asked to stop, while an average is under way behind steps; φ and its momentum go on."""

from __future__ import annotations

import json

import pytest
from support.faults import Run, assert_the_same
from support.records import records

pytestmark = pytest.mark.timeout(900)  # a test starts several jobs, each with a deadline of its own

OVERLAP = (
    *("--method.preset", "diloco", "--method.period.period", "10", "--method.overlap", "8"),
    *("--evaluate_every_epochs", "6"),
)
"""Of ten steps, the first eight have an average under way, but for an evaluation every 40 steps, which waits for it. Checkpoints
follow every fifth step.
"""


def manifest(run: Run) -> dict[str, object]:
    path = run.output / f"checkpoints/step-{run.checkpoints[-1]:010}/manifest.json"
    contents: dict[str, object] = json.loads(path.read_text())
    return contents


@pytest.mark.parametrize("backend", ["mpi4py", "horovod"])
def test_a_rank_dies_inside_an_overlap(make, undisturbed, backend):
    run = make(*OVERLAP)
    for fault in ("kill:computing:1:27", "kill:averaging:0:2"):
        assert run.start(fault, HVDLOCAL_BACKEND=backend).code not in (0, 2, 85)
        assert (manifest(run)["in_sync"], manifest(run)["shared"]) == (False, True)
    assert run.start(HVDLOCAL_BACKEND=backend).code == 0
    assert_the_same(run, undisturbed(*OVERLAP))


def test_a_request_and_other_numbers_of_ranks(make):
    """A request takes effect where no average is under way, here within two rounds; another number goes on with φ."""
    run = make(*OVERLAP, "--epochs", "20")
    for ranks in (2, 3, 1):
        run.ranks = ranks
        assert run.start("usr2:computing:0:5").code == 85
        assert manifest(run)["shared"] is True
    run.ranks = 2
    result = run.start()
    assert result.code == 0, result.err
    assert "averaged over the 1 rank that wrote it" in result.out
    end = records(run.output)[-1]
    assert end["averages"].startswith(
        "the outer optimizer nesterov (lr 0.7, momentum 0.5) steps on each; applied 8 steps later"
    )
    assert end["evaluation"]["accuracy"] > 0.9
