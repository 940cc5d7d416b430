"""hvdlocal.Checkpoints in a job that goes on without ranks that die."""

import json

import pytest
import torch
from support.mortal import Death, run_mortal
from torch import nn

import hvdlocal
from hvdlocal.training import interruption
from hvdlocal.training.checkpoint import files

RANKS = 3


def loop(communicator, path, steps, finish=True, losses=None):
    """A loop of a user's own; returns what was restored, the steps, and the model."""
    torch.set_num_threads(1)
    model = nn.Linear(2, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = hvdlocal.LocalOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        period=hvdlocal.ConstantPeriod(2),
        on_loss=None if losses is None else losses.append,
        communicator=communicator,
    )
    target = float(communicator.rank)
    with hvdlocal.Checkpoints(path, optimizer=optimizer, every_steps=4) as checkpoints:
        restored = checkpoints.resume()
        while checkpoints.steps < steps:
            optimizer.zero_grad()
            (model(torch.ones(1, 2)) - target).square().sum().backward()
            optimizer.step()
            checkpoints.after_step()
        optimizer.synchronize()
        if finish:
            checkpoints.finish()
    return restored, checkpoints.steps, model.weight.detach().clone()


@pytest.mark.parametrize(
    "at",
    [
        Death(0, "hvdlocal.average", 3),
        Death(0, "hvdlocal.poll", 3),
        Death(0, "hvdlocal.checkpoint", 2),  # the first one is of "hvdlocal.checkpoints"
        Death(0, "hvdlocal.position", 2),  # while a checkpoint begins
        Death(0, "hvdlocal.finish", 1),
        Death(1, "hvdlocal.checkpoint", 2),
    ],
    ids=str,
)
def test_a_loop_goes_on_and_finishes(tmp_path, at):
    results = run_mortal(RANKS, lambda communicator: loop(communicator, tmp_path, 21), at)
    first, second = [one for one in results if one is not None]
    assert first[:2] == second[:2] == (None, 21)
    assert torch.equal(first[2], second[2])
    assert json.loads((tmp_path / "finished.json").read_text())["steps"] == 21
    root = tmp_path / "checkpoints"
    assert not list(root.glob("*.tmp"))
    newest = files.read_manifest(files.directory(root, files.newest_first(root)[0]))
    assert newest["num_workers"] == (RANKS if at.collective == "hvdlocal.finish" else RANKS - 1)


@pytest.mark.parametrize("collective", ["hvdlocal.checkpoints", "hvdlocal.status", "hvdlocal.records"])
def test_a_rank_that_dies_before_the_first_step(tmp_path, collective, monkeypatch):
    """The loop has not begun, and another start has all ranks again."""
    monkeypatch.setattr(interruption, "ignore", lambda: None)  # threads cannot ignore signals
    told = r"interrupted before training began: rank 0 on node0 is lost; the other 2 ranks go on\. The same command"
    with pytest.raises(hvdlocal.Interrupted, match=told):
        run_mortal(RANKS, lambda communicator: loop(communicator, tmp_path, 21), Death(0, collective))
    results = run_mortal(RANKS, lambda communicator: loop(communicator, tmp_path, 21))
    assert [one[:2] for one in results] == [(None, 21)] * RANKS


def test_a_later_start_uses_all_ranks_again(tmp_path):
    losses = []
    run_mortal(
        RANKS,
        lambda communicator: loop(
            communicator, tmp_path, 21, finish=False, losses=losses if communicator.rank == 2 else None
        ),
        Death(0, "hvdlocal.average", 3),
    )
    assert [loss.ranks for loss in losses] == [(0,)]
    results = run_mortal(RANKS, lambda communicator: loop(communicator, tmp_path, 30))
    restored = results[0][0]
    assert (restored.ranks, restored.averaged) == (2, True)
    assert restored.steps in (12, 16, 20)  # as fast as the disk was
    assert [steps for _, steps, _ in results] == [30] * RANKS
