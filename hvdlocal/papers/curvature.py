"""How sharp the minimum is that a run found: measured once, on its own training images, and kept beside the run."""

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
from hvdlocal.papers.sharpness import Sharpness, sharpness
from hvdlocal.training import TrainConfig
from hvdlocal.training.builders import model_from_config
from hvdlocal.training.preprocessing import preprocessing_from_config

CURVATURE = "curvature.json"
IMAGES = 2_500


@dataclass(frozen=True)
class Curvature:
    """The training loss around the final average: without augmentation, weight decay and label smoothing.

    Attributes:
        loss: its value.
        largest, trace, trace_error: of its Hessian; see `Sharpness`.
        images: over how many training images.
    """

    loss: float
    largest: float
    trace: float
    trace_error: float
    images: int


def known(directory: Path) -> Curvature | None:
    """What was measured before."""
    path = directory / CURVATURE
    return Curvature(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def measure(directory: Path, config: TrainConfig) -> Curvature:
    """Measures the final model of a finished run on the CPU, and writes the result beside it.

    Args:
        directory: of the run.
        config: of the run.

    Raises:
        ImportError: SciPy is missing.
    """
    with closing(ShardedDataset(config.data.path, config.data.train_split, storage="mmap")) as data:
        images = preprocessing_from_config(config.data, data)
        model = model_from_config(config, data.num_classes, images).eval()
        model.load_state_dict(torch.load(directory / "model.pt", weights_only=True))
        batches = first_images(data, images, IMAGES)
    total = sum(len(y) for _, y in batches)

    def losses() -> Iterator[torch.Tensor]:
        for x, y in batches:
            yield F.cross_entropy(model(x).float(), y, reduction="sum") / total

    with torch.no_grad():
        loss = sum(part.item() for part in losses())
    hessian: Sharpness = sharpness([p for p in model.parameters() if p.requires_grad], losses)
    curvature = Curvature(loss, **asdict(hessian), images=total)
    write_text(directory / CURVATURE, json.dumps(asdict(curvature), indent=1) + "\n")
    return curvature
