"""Wide residual networks (Zagoruyko and Komodakis 2016) for 32×32 images."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class _Block(nn.Module):
    """A pre-activation block: norm, ReLU, convolution, twice; a 1×1 convolution on the shortcut if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(self.norm1(x))
        residual = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return residual + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """WRN-depth-width: three groups of (depth − 4)/6 blocks with 16, 32 and 64 times `width` channels."""

    def __init__(self, depth: int, width: int, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth={depth}: a wide ResNet has 6n + 4 layers")
        blocks = (depth - 4) // 6
        layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1, bias=False)]
        inputs = 16
        for group, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range(blocks):
                layers.append(_Block(inputs, outputs, stride=2 if group and not block else 1))
                inputs = outputs
        self.features = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(inputs)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits (N, num_classes) of images (N, channels, height, width)."""
        x = F.relu(self.norm(self.features(x)))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


def wrn_28_2(num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Builds Wide-ResNet-28-2, Balles et al.'s network for ImageNet-32; 1.5 million parameters and the classifier."""
    return WideResNet(28, 2, num_classes, shape[2])
