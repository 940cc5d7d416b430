"""`hvdlocal train` goes on without ranks that are killed: 32 local steps on three ranks, with an average every four."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
import torch
from support.configs import write_config
from support.datasets import TEST_IMAGES
from support.faults import Run
from support.records import records

SETTINGS = {
    "survive": True,
    "method": {"preset": "local", "period": {"period": 4}},
    "checkpoint": {"every_steps": 5},
    "evaluate_every_epochs": 2,
    "epochs": 8,
    "device": "cpu",
}
SURVIVING = {"HVDLOCAL_BACKEND": "mpi4py"}


@pytest.fixture
def make(data, tmp_path):
    def run(ranks: int, *arguments: str) -> Run:
        output = tmp_path / "out"
        config = write_config(tmp_path / "run.yaml", data, output, **SETTINGS)
        return Run(config, output, ranks, arguments, options=("--with-ft", "ulfm"))

    return run


def assert_complete(run: Run, lost: list[int]) -> None:
    """All that a run writes is there once, and tells of the lost ranks."""
    summary = json.loads((run.output / "summary.json").read_text())
    recorded = records(run.output)
    assert [record["kind"] for record in recorded].count("end") == 1
    assert recorded[-1]["kind"] == "end"
    assert [one["round"] for one in records(run.output, "round")] == list(range(1, summary["rounds"] + 1))
    assert all(before["step"] <= after["step"] for before, after in pairwise(recorded))
    assert [one["samples"] for one in records(run.output, "evaluation")] == [TEST_IMAGES] * 4
    assert sorted(rank for one in records(run.output, "lost") for rank in one["ranks"]) == lost
    assert summary["data_epochs"] >= SETTINGS["epochs"]
    for name in ("model.pt", "best.pt"):
        state = torch.load(run.output / name, weights_only=True)
        assert all(bool(tensor.isfinite().all()) for tensor in state.values())


def test_killed_in_an_average_and_in_an_evaluation(make):
    """First rank 0, whose duties pass to rank 1, and then rank 1."""
    run = make(3)
    result = run.start("kill:averaging:0:2", "kill:evaluating:1:2", **SURVIVING)
    assert result.code == 0, result.err
    assert "rank 0 on " in result.out
    assert "without the 32 samples that it was given since the last average" in result.out
    assert "local on 3 ranks, of which 2 died" in result.out
    assert_complete(run, [0, 1])
    (first, second) = records(run.output, "lost")
    assert (first["remaining"], first["round_samples_lost"]) == (2, 32)
    assert (second["remaining"], second["round_samples_lost"]) == (1, 0)


def test_two_killed_at_once_and_one_at_a_checkpoint(make):
    run = make(4)
    result = run.start("kill:checkpointing:2:2", "kill:computing:0:15", "kill:computing:3:15", **SURVIVING)
    assert result.code == 0, result.err
    assert_complete(run, [0, 2, 3])


def test_an_island_leaves_with_a_rank_that_is_killed(make):
    """The first one, whose duties pass to rank 2; its rank 1 is alive and goes, too."""
    run = make(4, "--method.island", "2")
    result = run.start("kill:computing:0:15", **SURVIVING)
    assert result.code == 0, result.err
    assert re.search("rank 1 of 4 on .* leaves the job, because its island has lost rank 0", result.err)
    assert "local on 4 ranks in islands of 2, of which 2 died" in result.out
    assert_complete(run, [0, 1])


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_at_the_end(make, rank):
    """Rank 0 before the summary is written, which the other rank does; the other one as it is about to say how the run ended."""
    run = make(2)
    result = run.start("kill:ending:0:1" if rank == 0 else "kill:settled:1:1", **SURVIVING)
    assert result.code == 0, result.err
    assert "local on 2 ranks" in result.out
    assert_complete(run, [])


def test_too_few_leave_with_a_checkpoint_from_which_all_ranks_go_on(make):
    run = make(3, "--min_workers", "3")
    result = run.start("kill:computing:0:11", **SURVIVING)
    assert result.code == 85, result.err
    assert "interrupted after step 12: 2 ranks are left of 3, fewer than min_workers=3" in result.out
    assert run.checkpoints[-1] == 12
    again = run.start(**SURVIVING)
    assert again.code == 0, again.err
    assert_complete(run, [0])


def test_killed_at_the_start(make):
    run = make(3)
    result = run.start("kill:opening:2:1", **SURVIVING)
    assert result.code == 85, result.err
    assert "interrupted before training began: rank 2 on " in result.out
    again = run.start(**SURVIVING)
    assert again.code == 0, again.err
    assert_complete(run, [])
