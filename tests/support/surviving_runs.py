"""Runs of the trainer as threads of a job that survives, some of whose ranks die.

96 samples to train on, 31 to test, batches of 4 on 4 ranks: an epoch is 6 steps, or 8 of three ranks, or 12 of two.
"""

import copy

import numpy as np
import torch
from support.mortal import run_mortal

from hvdlocal.training import Interrupted, Trainer
from hvdlocal.training.config import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    PeriodConfig,
    TrainConfig,
)
from hvdlocal.training.tasks import Regression

AVERAGE, GRADIENTS = "hvdlocal.average", "hvdlocal.gradients"
TRAIN, TEST, BATCH, RANKS, EPOCHS = 96, 31, 4, 4, 4
LOCAL = MethodConfig("local", period=PeriodConfig(period=3))


class Watched(Regression):
    """Notes the number of each training sample, which is its input."""

    def __init__(self):
        super().__init__()
        self.trained = []

    def loss(self, model, batch):
        if model.training:
            self.trained += batch[0][:, 0].round().int().tolist()
        return super().loss(model, batch)


class Job:
    """A run on ranks some of which die.

    Attributes:
        results: what the run returned, or the `Interrupted` that it raised, by rank; None for a rank that died.
        trained: the numbers of the samples that each rank was given.
        trainers: of each rank.
    """

    def __init__(self, config, *deaths, ranks=RANKS, callbacks=(), prepare=lambda rank, trainer: None):
        model = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(model.weight)
        torch.nn.init.zeros_(model.bias)
        tasks = [Watched() for _ in range(ranks)]
        self.trainers = [None] * ranks

        def body(comm):
            own = comm.rank
            try:
                self.trainers[own] = Trainer(
                    config, comm, task=tasks[own], model=copy.deepcopy(model), callbacks=callbacks
                )
                prepare(own, self.trainers[own])
                tasks[own].trained.clear()  # of the trial of a user's code during set-up
                return self.trainers[own].run()
            except Interrupted as reason:
                return reason

        self.results = run_mortal(ranks, body, *deaths)
        self.trained = [task.trained for task in tasks]

    @property
    def summary(self):
        """Of the first rank that is left."""
        return next(result for result in self.results if result is not None)


def write_samples(path):
    """Writes the data sets."""
    for name, count in (("train", TRAIN), ("test", TEST)):
        x = np.arange(count, dtype=np.float32)[:, None]
        np.savez(path / f"{name}.npz", x=x, y=x / 100)


def configured(place, **settings):
    """The configuration of a run in `place / "out"` on the data sets in `place`."""
    own = {"inputs": "x", "targets": "y", "test_path": str(place / "test.npz"), "batch_size": BATCH}
    data = DataConfig(str(place / "train.npz"), **own, **settings.pop("data", {}))
    usual = {
        "epochs": EPOCHS,
        "optimizer": OptimizerConfig(lr=1e-5, momentum=0.0),
        "method": LOCAL,
        "device": "cpu",
        "log_every_seconds": 1000,
        "survive": True,
    }
    return TrainConfig(data, ModelConfig("given"), str(place / "out"), **{**usual, **settings})
