"""Learning real numbers: arrays from arrays."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvdlocal.training.tasks.base import Batch, Metrics, Task

Loss = Literal["mse", "mae", "huber"]

LOSSES = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.smooth_l1_loss}


class Regression(Task):
    """Learns targets of any shape by a mean over all their elements, which count alike.

    The model takes the inputs as they are (a tensor, or a dict of tensors by name) and returns what the targets are: a tensor, or
    a dict with the same names. Floating-point arrays reach it as float32.

    Args:
        loss: "mse", the mean squared error; "mae", the mean absolute error; "huber", quadratic for errors below 1, then linear.
    """

    best = ("loss", "min")

    def __init__(self, loss: Loss = "mse") -> None:
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r}: choose one of {', '.join(LOSSES)}")
        self._loss = LOSSES[loss]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Computes the mean loss over all elements of the targets."""
        pairs = self._pairs(model, batch)
        total = sum(self._loss(output, target, reduction="sum") for output, target in pairs)
        assert isinstance(total, Tensor)
        return total / sum(target.numel() for _, target in pairs), pairs

    def metrics(self, output: Any, batch: Batch) -> Metrics:
        """Sums absolute and squared errors over all elements of the targets."""
        count = sum(target.numel() for _, target in output)
        errors = [(predicted.detach() - target).double() for predicted, target in output]
        return {
            "mae": (torch.stack([error.abs().sum() for error in errors]).sum(), count),
            "mse": (torch.stack([error.square().sum() for error in errors]).sum(), count),
        }

    def evaluate(self, model: nn.Module, batch: Batch) -> Metrics:
        """Computes the loss, weighted by the elements of the targets, and `metrics`."""
        loss, pairs = self.loss(model, batch)
        count = sum(target.numel() for _, target in pairs)
        return {"loss": (loss.detach().double() * count, count), **self.metrics(pairs, batch)}

    def _pairs(self, model: nn.Module, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Returns (output, target) of every target."""
        inputs, targets = batch
        outputs = model({name: _real(x) for name, x in inputs.items()} if isinstance(inputs, dict) else _real(inputs))
        if isinstance(targets, dict):
            if not isinstance(outputs, dict) or outputs.keys() != targets.keys():
                raise ValueError(f"the model must return a dict with the targets {', '.join(targets)}")
            pairs = [(outputs[name].float(), targets[name].float()) for name in targets]
        else:
            if not isinstance(outputs, Tensor):
                raise ValueError(f"the model must return a tensor like the targets, not {type(outputs).__name__}")
            pairs = [(outputs.float(), targets.float())]
        for output, target in pairs:
            if output.shape != target.shape:
                raise ValueError(
                    f"the model returns {tuple(output.shape)} where the targets are {tuple(target.shape)}; their shapes must "
                    "be equal"
                )
        return pairs


def _real(array: Tensor) -> Tensor:
    return array.float() if array.is_floating_point() else array
