"""A network and a task of one's own, named in run.yaml by their import paths."""

import torch
from torch import nn

import hvdlocal


class Net(nn.Module):
    """Estimates a few numbers from a field (N, D, H, W, C)."""

    def __init__(self, outputs: int, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(1, width, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2),
            nn.Conv3d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1),
            nn.Flatten(), nn.Linear(2 * width, outputs),
        )  # fmt: skip

    def forward(self, field: torch.Tensor) -> torch.Tensor:
        return self.layers(field.movedim(-1, 1))


class RelativeError(hvdlocal.Task):
    """Learns numbers by their relative error, and counts those that are met within 10 %."""

    best = ("within_tenth", "max")
    percent = ("within_tenth",)

    def loss(self, model, batch):
        field, parameters = batch
        output = model(field)
        return ((output / parameters - 1) ** 2).mean(), output

    def metrics(self, output, batch):
        met = (output / batch[1] - 1).abs() < 0.1
        return {"within_tenth": (met.sum(), met.numel())}
