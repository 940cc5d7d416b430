"""Runs of the trainer in this process that end like a killed one, and what they leave."""

import json

import torch
from support.faults import DIFFERS
from support.records import records

from hvdlocal.training import Trainer
from hvdlocal.training.checkpoint.coordinator import CheckpointCoordinator


class Killed(BaseException):
    """In place of SIGKILL, which tests/launch sends."""


def train(comm, settings, monkeypatch, die_after=None):
    """Trains; ends like a killed process after so many steps of the run. Returns the trainer."""
    trainer = Trainer(settings, comm)
    original = CheckpointCoordinator.after_step

    def after_step(self, steps):
        original(self, steps)
        if steps == die_after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointCoordinator, "after_step", after_step)
        try:
            trainer.run()
        except Killed:
            trainer.coordinator.status.close()
            trainer.optimizer.finish_average()  # a process that is killed leaves no collective to the next run
    comm.barrier("test.trained")
    return trainer


def outcome(directory):
    """Everything a run leaves that is not a time."""
    recorded = records(directory)
    summary = json.loads((directory / "summary.json").read_text())
    for record in [*recorded, summary]:
        for name in filter(DIFFERS.search, list(record)):
            del record[name]
    models = [torch.load(directory / name, weights_only=True) for name in ("model.pt", "best.pt")]
    return recorded, summary, models


def same(a, b):
    return a[:2] == b[:2] and all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
        for x, y in zip(a[2], b[2], strict=True)
    )
