"""The sharpness of the minimum that a run found, measured once and stored in the run's directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from hvdlocal.data import ShardedDataset
from hvdlocal.directory import write_text
from hvdlocal.papers.fixed_subset import first_images
from hvdlocal.papers.sharpness import sharpness
from hvdlocal.training import TrainConfig
from hvdlocal.training.builders import model_from_config
from hvdlocal.training.preprocessing import preprocessing_from_config
from hvdlocal.training.tasks import build_task

FILE = "curvature.json"
"""Name of the stored result in the run's directory."""

IMAGES = 2_500
"""Number of training images over which the loss is taken."""


@dataclass(frozen=True)
class RunSharpness:
    """The training loss at the final average, without augmentation, weight decay and label smoothing, and its Hessian.

    Attributes:
        loss: the loss.
        largest: the largest eigenvalue of its Hessian.
        trace: an estimate of the trace of its Hessian.
        trace_error: the standard error of that estimate.
        images: the number of training images.
    """

    loss: float
    largest: float
    trace: float
    trace_error: float
    images: int


def stored(directory: Path) -> RunSharpness | None:
    """Reads the sharpness of the run in this directory; None if it has not been measured."""
    path = directory / FILE
    return RunSharpness(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def measure(directory: Path, config: TrainConfig) -> RunSharpness:
    """Measures the final model of a finished run on the CPU and stores the result.

    Args:
        directory: the run's directory.
        config: the run's configuration.

    Raises:
        ImportError: SciPy is missing.
    """
    with closing(ShardedDataset(config.data.path, config.data.train_split, storage="mmap")) as data:
        images = preprocessing_from_config(config.data, data)
        model = model_from_config(config, build_task(config), data).eval()
        model.load_state_dict(torch.load(directory / "model.pt", weights_only=True))
        batches = first_images(data, images, IMAGES)
    total = sum(len(y) for _, y in batches)

    def losses() -> Iterator[torch.Tensor]:
        for x, y in batches:
            yield F.cross_entropy(model(x).float(), y, reduction="sum") / total

    with torch.no_grad():
        loss = sum(part.item() for part in losses())
    hessian = sharpness([p for p in model.parameters() if p.requires_grad], losses)
    found = RunSharpness(loss, **asdict(hessian), images=total)
    write_text(directory / FILE, json.dumps(asdict(found), indent=1) + "\n")
    return found
