"""What a step of the trainer costs beside a bare loop over the same tensors, with hvdlocal's task and with a user's own.

    python benchmarks/task_step.py

The trainer runs as it is, in one process with one thread. A callback interrupts it after every block of steps for a block of the
bare loop: zero_grad, forward, backward and step of torch's SGD, with the same batches. Both are measured in CPU seconds of the
training thread, so that other work on the machine does not count; the ratio is the median over the pairs of blocks.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import hvdlocal
from hvdlocal.communicator import SingleProcess
from hvdlocal.models import build_model
from hvdlocal.training.config import DataConfig, MethodConfig, ModelConfig, PeriodConfig, TrainConfig
from hvdlocal.training.trainer import Trainer

BLOCK = 10
"""Steps of a block."""

BATCH, BATCHES = 64, 8
CLASSES = 10


class OwnTask(hvdlocal.Task):
    """Classification as a user would write it."""

    best = ("accuracy", "max")

    def build_model(self, model: ModelConfig, data: Any) -> torch.nn.Module:
        """Builds the same network as image-classification."""
        return build_model("resnet9_narrow", CLASSES, (32, 32, 3))

    def loss(self, model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the cross-entropy and the logits."""
        logits = model(batch[0])
        return F.cross_entropy(logits, batch[1]), logits

    def metrics(self, output: torch.Tensor, batch: Any) -> dict[str, Any]:
        """Counts what is right."""
        return {"accuracy": ((output.argmax(1) == batch[1]).sum(), len(batch[1]))}


class Blocks(hvdlocal.Callback):
    """Runs a block of the bare loop after every block of the trainer."""

    def __init__(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.ratios: list[float] = []
        self._batches = itertools.cycle(batches)
        torch.manual_seed(0)
        self._model = build_model("resnet9_narrow", CLASSES, (32, 32, 3))
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-3, momentum=0.9)
        self._steps = 0
        self._begun = time.thread_time()

    def on_step(self, run: hvdlocal.training.RunView) -> None:
        """Counts a step of the trainer."""
        self._steps += 1
        if self._steps % BLOCK == 0:
            trained = time.thread_time() - self._begun
            start = time.thread_time()
            with torch.enable_grad():
                self._train()
            self.ratios.append(trained / (time.thread_time() - start))
            self._begun = time.thread_time()

    def _train(self) -> None:
        for x, y in itertools.islice(self._batches, BLOCK):
            self._optimizer.zero_grad()
            F.cross_entropy(self._model(x), y).backward()
            self._optimizer.step()


def measure(directory: Path, task: str, preset: str, blocks: int) -> float:
    """Returns the CPU seconds of a trainer's step in units of the bare loop's."""
    steps = (blocks + 1) * BLOCK
    config = TrainConfig(
        DataConfig(str(directory / "data"), batch_size=BATCH),
        ModelConfig("resnet9_narrow"),
        str(directory / f"{task}-{preset}".replace(":", "-")),
        epochs=steps / BATCHES,
        evaluate_every_epochs=1e6,
        method=MethodConfig(preset, PeriodConfig(period=8)),  # type: ignore[arg-type]
        task=task,
        device="cpu",
        threads=1,
    )
    batches = [(torch.randn(BATCH, 3, 32, 32), torch.randint(CLASSES, (BATCH,))) for _ in range(BATCHES)]
    watch = Blocks(batches)
    trainer = Trainer(config, SingleProcess(), callbacks=[watch])
    trainer.state.loader.endless = lambda: (one for one in itertools.cycle(batches))  # type: ignore[method-assign]
    trainer.run()
    return statistics.median(watch.ratios[2:])  # the first blocks allocate


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=40, help="pairs of blocks")
    blocks = parser.parse_args().blocks
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        generator = np.random.default_rng(0)
        for split in ("train", "test"):
            images = generator.integers(0, 256, (BATCH * BATCHES, 32, 32, 3), dtype=np.uint8)
            labels = np.arange(len(images)) % CLASSES
            hvdlocal.ShardWriter(directory / "data", split, classes=list(map(str, range(CLASSES)))).write(
                images, labels
            )
        for task in ("image-classification", "task_step:OwnTask"):
            for preset in ("sync", "local"):
                print(
                    f"{task:22} {preset:6} {measure(directory, task, preset, blocks):.3f} × the bare loop", flush=True
                )


if __name__ == "__main__":
    main()
