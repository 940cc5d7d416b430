"""Wrote what lies beside it, at commit d8a0cb7: data sets, a configuration and an interrupted run that every later version reads.

    python tests/golden/v1/make.py DIRECTORY data
    HVDLOCAL_BACKEND=mpi4py install/mpirun -np 2 python tests/golden/v1/make.py DIRECTORY interrupted

Not to be run again: the files are what they are. tests/unit/data/format/test_golden.py, tests/unit/cli/test_golden.py and
tests/mpi/test_golden.py open them.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn

CLASSES = ["a", "b", "c"]
RUN = {
    "data": {"path": "data/images", "batch_size": 3, "flip": True, "storage": "ram", "threads": 1},
    "model": {"name": "golden"},
    "optimizer": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    "schedule": {"name": "cosine", "warmup_epochs": 0.5},
    "method": {"preset": "local-ada", "momentum": "average", "sketch_size": 16, "period": {"period": 5}},
    "epochs": 6,
    "evaluate_every_epochs": 1,
    "log_every_seconds": 0,
    "device": "cpu",
    "threads": 1,
    "checkpoint": {"every_steps": 4},
    "output": "run",
}


def build(num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Returns the network of the run, whose steps depend on the random state and on batch-norm statistics."""
    height, width, channels = shape
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(height * width * channels, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.1),
        nn.Linear(8, num_classes),
    )


def images(count: int, shape: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 images of three classes that differ in which rows are bright, and their labels."""
    pixels = np.random.default_rng(seed).integers(0, 60, (count, *shape), dtype=np.uint8)
    labels = np.arange(count) % 3
    for image, label in zip(pixels, labels, strict=True):
        image[2 * label : 2 * label + 2] += 150
    return pixels, labels


def jpegs(count: int, channels: int) -> list[bytes]:
    files = []
    for number in range(count):
        pixels, _ = images(1, (16 + number, 24 - number, channels), number)
        file = io.BytesIO()
        Image.fromarray(pixels[0].squeeze()).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def write_data(directory: Path) -> None:
    from hvdlocal.data.writer import JpegSample, JpegShardWriter, ShardWriter

    for split, count, shards in (("train", 48, 2), ("test", 15, 1)):
        ShardWriter(directory / "images", split, classes=CLASSES, num_shards=shards).write(
            *images(count, (6, 6, 1), count)
        )
    ShardWriter(directory / "colour", "train", classes=CLASSES, seed=3).write(*images(9, (6, 5, 3), 1))
    for name, channels in (("jpeg", 3), ("jpeg_gray", 1)):
        files = [JpegSample(file) for file in jpegs(5, channels)]
        JpegShardWriter(directory / name, "train", classes=CLASSES).write(files, np.arange(5) % 3)


def ending(num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Returns the network, which ends its process like a power cut at its 18th training step, inside a round."""
    model = build(num_classes, shape)
    steps = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        nonlocal steps
        steps += module.training
        if steps == 18:
            os._exit(1)

    model.register_forward_pre_hook(count)
    return model


def main(directory: str, what: str, *settings: str) -> int:
    from hvdlocal.cli import main as hvdlocal
    from hvdlocal.models import MODELS

    os.chdir(directory)
    if what == "data":
        write_data(Path("data"))
        Path("run.yaml").write_text(yaml.safe_dump(RUN, sort_keys=False))
        return 0
    MODELS["golden"] = ending if what == "interrupted" else build
    return hvdlocal(["train", "run.yaml", *settings])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
