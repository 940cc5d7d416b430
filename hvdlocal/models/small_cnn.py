"""The network of the small reproductions: two convolutions and a linear layer, without batch norm."""

from __future__ import annotations

from torch import nn


def small_cnn(num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Builds two 3×3 convolutions of 32 and 64 channels, each with ReLU and 2×2 max-pooling, and a linear layer.

    The network has 30,000 parameters for ten classes of 16×16 colour images.
    """
    height, width, channels = shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), num_classes),
    )
