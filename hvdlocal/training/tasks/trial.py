"""One step with a user's code before training, so that its mistakes are reported on all ranks before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from hvdlocal.import_path import own_code
from hvdlocal.training.config import TrainConfig
from hvdlocal.training.optimizers import build_inner
from hvdlocal.training.tasks.base import Batch, Task


def try_task(
    config: TrainConfig,
    task: Task,
    model: nn.Module,
    batches: tuple[Batch, Batch | None],
    autocast: Callable[[], AbstractContextManager[Any]],
    formatted: Callable[[Batch], Batch],
) -> None:
    """Takes one step on a training batch, and evaluates a test batch.

    Args:
        config: names the optimizer.
        task: is tried.
        model: is trained, and of no use afterwards.
        batches: a training batch, and a test batch if there is one.
        autocast: returns the context of forward passes.
        formatted: brings a batch into the model's memory format.

    Raises:
        ValueError: the code raised an error, or returned something else than a task should; the message says what.
    """
    training, testing = batches
    if isinstance(training[0], dict) and "reestimate" in config.method.buffer_policies:
        raise ValueError(
            "method.buffers=reestimate needs models of one input, but the data have several: choose average"
        )
    optimizer = build_inner(config.optimizer, model)
    model.train()
    with autocast():
        loss, output = task.loss(model, formatted(training))
    if not loss.requires_grad:
        raise ValueError(
            f"task={config.task}: the loss must be a scalar tensor with a gradient, but it has no gradient"
        )
    task.metrics(output, training)
    optimizer.zero_grad()
    with own_code(f"task={config.task} with model.name={config.model.name}"):
        loss.backward()
    with own_code(f"optimizer.name={config.optimizer.name}"):
        optimizer.step()
    if testing is not None:
        model.eval()
        with torch.no_grad(), autocast():
            task.evaluate(model, formatted(testing))
