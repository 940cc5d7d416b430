"""Residual networks for 32×32 images."""

from __future__ import annotations

import torch
from torch import nn

from hvdlocal.models.torchvision_import import import_torchvision


def resnet18_cifar(num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Builds ResNet-18 with a 3×3 stem and no max-pooling, as in Balles et al.'s CIFAR-10 experiments.

    The network has 11.2 million parameters.
    """
    model = import_torchvision().models.resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(shape[2], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class _Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def _convolution(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


def resnet9(num_classes: int, shape: tuple[int, int, int], width: int = 64) -> nn.Module:
    """Builds the 9-layer residual network of the DAWNBench CIFAR-10 entries (Page 2018); 6.6 million parameters at width 64."""
    return nn.Sequential(
        _convolution(shape[2], width),
        _convolution(width, 2 * width, pool=True),
        _Residual(2 * width),
        _convolution(2 * width, 4 * width, pool=True),
        _convolution(4 * width, 8 * width, pool=True),
        _Residual(8 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, num_classes),
        _Scale(0.125),  # as in the original: max-pooled features are large, and so would be the first losses
    )


def resnet9_narrow(num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Builds a `resnet9` a quarter as wide, with 0.4 million parameters, for machines with a few cores."""
    return resnet9(num_classes, shape, width=16)
