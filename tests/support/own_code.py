"""A user's own code, as configurations of tests name it: "support.own_code:NAME"."""

from __future__ import annotations

import torch
from support.models import Slope

import hvdlocal


class Downhill(hvdlocal.Task):
    """The gradient is `slope` in every weight, whatever the data are; the weights start at 5."""

    best = ("weight", "min")

    def __init__(self, slope: float = 1.0) -> None:
        self.slope = slope

    def loss(self, model, batch):
        return model(self.slope), model.w

    def metrics(self, output, batch):
        samples = len(batch[1])
        return {"weight": (output[0].detach() * samples, samples)}


class Uphill(Downhill):
    """The same, with the largest weight as the best."""

    best = ("weight", "max")


def halves(epoch: float, *, epochs: float, lr: float, factor: float = 0.5) -> float:
    """Returns lr in the first half of the run, and `factor` times that in the second."""
    return lr if epoch < epochs / 2 else lr * factor


class Shift:
    """Adds a constant to every pixel."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, inputs, keys):
        return inputs + self.by


class MeanPixel(hvdlocal.Task):
    """The loss is the mean of the inputs as they reach the model."""

    def build_model(self, model, data):
        return Slope(1, 1.0)

    def loss(self, model, batch):
        return model.w.sum() * batch[0].mean(), None


def network(num_classes: int, width: int = 4) -> torch.nn.Module:
    """Returns a network for 8×8 images."""
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, num_classes)
    )


def no_model() -> str:
    """Returns no model."""
    return "none"


class LossAlone(Downhill):
    """Forgets the output."""

    def loss(self, model, batch):
        return model(1.0)


class LossPerSample(Downhill):
    """Forgets the mean."""

    def loss(self, model, batch):
        return model.w[:2] * 1.0, None


class Detached(Downhill):
    """Loses the gradient."""

    def loss(self, model, batch):
        return torch.tensor(1.0), None


class MeanInsteadOfSum(Downhill):
    """Returns a mean as a metric."""

    def metrics(self, output, batch):
        return {"weight": output.mean()}


class NamedLikeAField(Downhill):
    """Calls a metric as a field of the records is called."""

    def metrics(self, output, batch):
        return {"lr": (1.0, 1)}


class NoSuchBest(Downhill):
    """Chooses the best model by a metric that it does not have."""

    best = ("accuracy", "max")


class FailsInEvaluation(Downhill):
    """Raises an error where the test data are used."""

    def evaluate(self, model, batch):
        return {}["weight"]


class FailsOnRankOne(Downhill):
    """Raises an error on rank 1."""

    def __init__(self) -> None:
        from hvdlocal.communicator import launched_rank

        if launched_rank() == 1:
            raise RuntimeError("only here")
        super().__init__()
