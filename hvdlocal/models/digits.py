"""A small convolutional network for the 8×8 digits of the first run."""

from __future__ import annotations

from torch import nn


def digits_cnn(num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Builds two 3×3 convolutions with batch norm, each pooled to half the size, and a linear layer.

    The network has about 16,000 parameters.
    """
    height, width, channels = shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 48, 3, padding=1, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48 * (height // 4) * (width // 4), num_classes),
    )
