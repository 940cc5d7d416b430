"""Learning the classes of images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hvdlocal.import_path import accepts, call, is_import_path, load
from hvdlocal.models import build_model
from hvdlocal.models.torchvision_import import prepare_torchvision
from hvdlocal.training.config import ModelConfig
from hvdlocal.training.tasks.base import Batch, DataDescription, Metrics, Task, checked_model


class ImageClassification(Task):
    """Classifies images by the cross-entropy of logits (N, classes).

    A model by import path gets the argument `num_classes` if it takes one that the configuration does not give.

    Args:
        label_smoothing: share of each label that is spread over all classes in the training loss.
        image_size: height and width in pixels that images are brought to; None leaves them as they are.
    """

    best = ("accuracy", "max")
    percent = ("accuracy", "top5")

    def __init__(self, label_smoothing: float = 0.0, image_size: int | None = None) -> None:
        self._criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self._image_size = image_size

    def build_model(self, model: ModelConfig, data: DataDescription) -> nn.Module:
        """Builds one of hvdlocal's models, or the user's own.

        Raises:
            ValueError: the data hold no classes of images, or the model cannot be built for them.
        """
        shape = self.input_shape(data)
        if not is_import_path(model.name):
            return build_model(model.name, len(data.classes), shape, model.arguments)
        prepare_torchvision(model.name)
        arguments = dict(model.arguments)
        if "num_classes" not in arguments and accepts(load(model.name, "model.name"), "num_classes"):
            arguments["num_classes"] = len(data.classes)
        return checked_model(call(model.name, "model.name", arguments=arguments), model)

    def input_shape(self, data: DataDescription) -> tuple[int, int, int]:
        """Returns (height, width, channels) of the model's input.

        Raises:
            ValueError: the data are no images with classes.
        """
        if data.kind not in ("images", "jpeg") or not data.classes:
            raise ValueError(
                f"task=image-classification needs images with classes, but the data are {data.kind}: choose another task"
            )
        if self._image_size is not None:
            return (self._image_size, self._image_size, 3 if data.shape is None else data.shape[2])
        if data.shape is None:
            raise ValueError("the data are JPEGs of many sizes: set data.image_size (224 for most ImageNet models)")
        return data.shape

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Computes the cross-entropy of integer labels (N,), or of the shares of the classes (N, classes)."""
        x, y = batch
        logits = model(x)
        return self._criterion(logits, y), logits

    def metrics(self, output: Any, batch: Batch) -> Metrics:
        """Counts the images whose largest logit is that of their class."""
        labels = batch[1]
        if labels.is_floating_point():  # of MixUp: the class with the greater share counts
            labels = labels.argmax(1)
        return {"accuracy": ((output.detach().argmax(1) == labels).sum(), len(labels))}

    def evaluate(self, model: nn.Module, batch: Batch) -> Metrics:
        """Computes the cross-entropy without smoothing, the accuracy and, with more than five classes, the top-5 accuracy."""
        x, y = batch
        logits = model(x).float()
        classes, n = logits.shape[1], len(y)
        best = logits.topk(min(5, classes), dim=1).indices == y[:, None]
        return {
            "loss": (F.cross_entropy(logits, y, reduction="sum"), n),
            "accuracy": (best[:, 0].sum(), n),
            "top5": (best.any(1).sum(), n) if classes > 5 else (0, 0),
        }
