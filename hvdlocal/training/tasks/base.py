"""What a run learns: the interface between the trainer and a model, its loss and its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from hvdlocal.import_path import call, is_import_path
from hvdlocal.models.torchvision_import import prepare_torchvision
from hvdlocal.training.config import ModelConfig

Inputs = TypeVar("Inputs", Tensor, dict[str, Tensor])

Batch = tuple[Any, Any]
"""(inputs, targets): tensors or, where a data set has several named arrays, a dict of tensors by name."""

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]
"""Metrics by name, each as a sum over the samples of a batch and the count that divides it."""


class DataDescription(Protocol):
    """What a task can learn of the data before training: an opened split, or only its manifest.

    Attributes:
        kind: how samples are stored: "images", "jpeg", "arrays" or "tokens".
        shape: (height, width, channels) of images; None where they differ and for other kinds.
        classes: names of the classes; empty where samples have no labels.
        facts: what is true of all samples, as the manifest has it.
    """

    @property
    def kind(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int, int] | None: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...


class Task:
    """What a run learns: its model, its loss, and the metrics by which models are compared.

    A subclass implements `loss`, and what else differs from here. The trainer calls every method on every rank; none may
    communicate. An instance holds settings only, since nothing of it is saved in checkpoints.

    An example, for `task: "fields:Denoising"` in a configuration:

    ```python
    class Denoising(hvdlocal.Task):
        best = ("error", "min")

        def loss(self, model, batch):
            noisy, clean = batch
            output = model(noisy)
            return torch.nn.functional.mse_loss(output, clean), output

        def metrics(self, output, batch):
            return {"error": ((output - batch[1]).abs().sum(), output.numel())}
    ```

    Attributes:
        best: the metric by which `best.pt` is chosen, and whether its best value is the largest ("max") or the smallest
            ("min").
        percent: the metrics that are shown in percent; their values lie between 0 and 1.
    """

    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("loss", "min")
    percent: ClassVar[tuple[str, ...]] = ()

    def describe(self, name: str) -> dict[str, Any]:
        """Returns what readers of the records need to know of the task, for environment.json.

        Args:
            name: as the configuration names it.
        """
        best, direction = self.best
        return {"name": name, "best": best, "direction": direction, "percent": list(self.percent)}

    def build_model(self, model: ModelConfig, data: DataDescription) -> nn.Module:
        """Builds a freshly initialised model for the data. Here, the configuration names it by import path.

        Args:
            model: the section of the configuration.
            data: the training data.

        Raises:
            ValueError: the model cannot be built; the message says why.
        """
        if not is_import_path(model.name):
            raise ValueError(
                f"model.name={model.name}: {type(self).__name__} has no model of this name; name your own as "
                "package.module:name"
            )
        prepare_torchvision(model.name)
        return checked_model(call(model.name, "model.name", arguments=model.arguments), model)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Computes the loss of a batch; called under autocast where the configuration sets a lower precision.

        Args:
            model: as training calls it, which may be compiled.
            batch: inputs and targets, on the device.

        Returns:
            The mean loss over the samples, a scalar tensor with a gradient, and what `metrics` needs, such as the output.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss(): implement it")

    def metrics(self, output: Any, batch: Batch) -> Metrics:
        """Computes the metrics of a batch beside the loss; none here.

        Args:
            output: the second result of `loss`.
            batch: as for `loss`.

        Returns:
            Sums and counts by name; "loss" is not among them. They may be tensors on the device, so that nothing waits for it.
        """
        return {}

    def evaluate(self, model: nn.Module, batch: Batch) -> Metrics:
        """Computes everything that an evaluation measures on a batch of test samples; called without gradients.

        Here, these are the loss, weighted by the samples of each batch, and `metrics`.

        Args:
            model, batch: as for `loss`; the model is in evaluation mode.
        """
        loss, output = self.loss(model, batch)
        samples = batch_length(batch)
        return {"loss": (loss.detach().double() * samples, samples), **self.metrics(output, batch)}


def batch_length(batch: Batch) -> int:
    """Returns the number of samples in a batch."""
    inputs = batch[0]
    return len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)


def checked_model(built: Any, model: ModelConfig) -> nn.Module:
    """Returns what a user's function has built, if that is a model that can be trained.

    Raises:
        ValueError: it is none, it has no parameters, or some have no size yet.
    """
    if not isinstance(built, nn.Module):
        raise ValueError(
            f"model.name={model.name}: it returned {type(built).__name__}, but a model is a torch.nn.Module"
        )
    for name, parameter in built.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"model.name={model.name}: {name} of a lazy layer has no size yet; give the layer its size"
            )
    if not any(parameter.requires_grad for parameter in built.parameters()):
        raise ValueError(f"model.name={model.name}: it has no parameters that can be trained")
    return built
