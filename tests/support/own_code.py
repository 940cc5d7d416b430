"""A user's own code, as configurations of tests name it: "support.own_code:NAME"."""

from __future__ import annotations

import random

import numpy as np
import torch
from support.models import Slope

import hvdlocal
from hvdlocal.communicator import launched_rank, launched_size


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


class ReturnsTheLoss(Downhill):
    """Calls a metric loss, which would hide the loss."""

    def metrics(self, output, batch):
        return {"loss": (1.0, 1)}


class BestIsAWord(Downhill):
    """Forgets the direction."""

    best = "weight"


class WithoutLoss(hvdlocal.Task):
    """Implements nothing."""


class BuildsNothing(Downhill):
    """Builds no model."""

    def build_model(self, model, data):
        return None


class Later(Downhill):
    """Works for some calls and then fails in one of several ways, on rank 1 if there is one.

    The first call is that of the trial.
    """

    def __init__(self, how: str, calls: int = 4) -> None:
        super().__init__()
        self.how, self.left = how, calls

    def loss(self, model, batch):
        self.left -= 1
        if self.left < 0 and launched_rank() in (None, (launched_size() or 1) - 1):
            if self.how == "raises":
                return {}["later"]
            if self.how == "leaves":
                raise SystemExit(0)
            return None
        return super().loss(model, batch)


class Draws(Downhill):
    """Draws random numbers from NumPy and Python in every step."""

    def loss(self, model, batch):
        np.random.random()
        random.random()
        return super().loss(model, batch)


class OneElement(Downhill):
    """Returns loss and metrics as tensors of shape (1,), and numbers of NumPy."""

    def loss(self, model, batch):
        return model(self.slope).reshape(1), model.w

    def metrics(self, output, batch):
        return {"weight": (output[:1] * 2, torch.tensor([2])), "half": (np.float32(1.0), np.int64(2))}


def slow_half(parameters, lr):
    """Returns SGD over two groups, of which the second one has half of the rate."""
    first, second = parameters
    return torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": lr / 2}], lr=lr, momentum=0.0)


class TwoSlopes(torch.nn.Module):
    """Two weights with the gradient 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((1,), 5.0))
        self.v = torch.nn.Parameter(torch.full((1,), 5.0))

    def forward(self, c: float) -> torch.Tensor:
        return c * (self.w.sum() + self.v.sum())


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
        if launched_rank() == 1:
            raise RuntimeError("only here")
        super().__init__()
