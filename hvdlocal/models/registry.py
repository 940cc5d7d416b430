"""The models that a configuration can name."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hvdlocal.models.digits import digits_cnn
from hvdlocal.models.resnet import resnet9, resnet9_narrow, resnet18_cifar
from hvdlocal.models.small_cnn import small_cnn
from hvdlocal.models.torchvision_import import import_torchvision
from hvdlocal.models.wide_resnet import wrn_28_2

Builder = Callable[..., nn.Module]
"""A function (num_classes, (height, width, channels), **arguments) → model on float inputs (N, channels, height, width)."""


def _torchvision(name: str) -> Builder:
    def build(num_classes: int, shape: tuple[int, int, int], **arguments: Any) -> nn.Module:
        _require_rgb(name, shape)
        return getattr(import_torchvision().models, name)(num_classes=num_classes, **arguments)

    return build


def _vit_b_16(num_classes: int, shape: tuple[int, int, int], **arguments: Any) -> nn.Module:
    _require_rgb("vit_b_16", shape)
    height, width, _ = shape
    if height != width or height % 16:
        raise ValueError(f"vit_b_16 needs square images whose side is a multiple of 16, not {height}×{width}")
    return import_torchvision().models.vit_b_16(num_classes=num_classes, image_size=height, **arguments)


MODELS: dict[str, Builder] = {
    "digits_cnn": digits_cnn,
    "small_cnn": small_cnn,
    "resnet9": resnet9,
    "resnet9_narrow": resnet9_narrow,
    "resnet18_cifar": resnet18_cifar,
    "wrn_28_2": wrn_28_2,
    "resnet50": _torchvision("resnet50"),
    "resnet152": _torchvision("resnet152"),
    "vit_b_16": _vit_b_16,
}


def build_model(
    name: str, num_classes: int, shape: tuple[int, int, int], arguments: Mapping[str, Any] | None = None
) -> nn.Module:
    """Builds a freshly initialised model.

    Args:
        name: one of `MODELS`.
        num_classes: length of the model's output.
        shape: (height, width, channels) of the images.
        arguments: further arguments of the model's builder.

    Raises:
        ValueError: there is no such model, or it cannot take such images or arguments.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no model {name!r}: {hint}choose one of {', '.join(MODELS)}")
    try:
        return MODELS[name](num_classes, shape, **(arguments or {}))
    except TypeError as error:
        raise ValueError(f"model.arguments={dict(arguments or {})}: {error}") from error


LARGEST_TRIED = 64
"""Side of the largest image that is tried when a model rejects smaller ones."""


def check_images(
    name: str,
    num_classes: int,
    shape: tuple[int, int, int],
    batch_size: int,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Checks that a model can be trained on such images: pooling may reduce small images to nothing.

    Args:
        name, num_classes, shape: as for `build_model`.
        batch_size: size of the smallest batch; batch norm needs more than one value.
        arguments: as for `build_model`.

    Raises:
        ValueError: there is no such model, or it cannot take such images or batches; the message gives the smallest possible.
    """
    arguments = arguments or {}
    reason = _refusal(name, num_classes, shape, batch_size, arguments)
    if reason is None:
        return
    height, width, channels = shape
    if _refusal(name, num_classes, shape, 2, arguments) is None:
        raise ValueError(
            f"{name} cannot be trained on a batch of {batch_size} of {height}×{width} pixels ({reason}): let every batch of a "
            "rank hold at least 2 images (data.batch_size, data.tail)"
        )
    larger = range(min(height, width) + 1, LARGEST_TRIED + 1)
    side = next(
        (side for side in larger if _refusal(name, num_classes, (side, side, channels), 2, arguments) is None), None
    )
    remedy = (
        "choose another model" if side is None else f"set data.image_size to {side} or more, or choose another model"
    )
    raise ValueError(f"{name} cannot take images of {height}×{width} pixels ({reason}): {remedy}")


def _refusal(
    name: str, num_classes: int, shape: tuple[int, int, int], batch_size: int, arguments: Mapping[str, Any]
) -> str | None:
    """Returns why a forward pass fails, or None; it is tried on torch's meta device, which computes only shapes."""
    height, width, channels = shape
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer for an image without pixels has no weights, and torch warns
        model = build_model(name, num_classes, shape, arguments)
        try:
            model(torch.empty(batch_size, channels, height, width, dtype=torch.get_default_dtype(), device="meta"))
        except (RuntimeError, ValueError) as error:
            return " ".join(str(error).split())
    return None


def _require_rgb(name: str, shape: tuple[int, int, int]) -> None:
    if shape[2] != 3:
        raise ValueError(f"{name} needs images of 3 channels, not {shape[2]}")
