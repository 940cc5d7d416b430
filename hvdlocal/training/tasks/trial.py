"""One step with a user's code before training, so that its mistakes are reported on all ranks before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hvdlocal.import_path import own_code
from hvdlocal.training.config import TrainConfig
from hvdlocal.training.optimizers import build_inner
from hvdlocal.training.tasks.base import Batch, Metrics, Task


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
    what = f"task={config.task} with model.name={config.model.name}"
    training, testing = batches
    optimizer = build_inner(config.optimizer, model)
    model.train()
    with own_code(what), autocast():
        result = task.loss(model, formatted(training))
    loss, output = _checked_loss(result, what)
    with own_code(what):
        metrics = task.metrics(output, training)
    _check_metrics(metrics, f"{what}: metrics()")
    with own_code(what):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if testing is None:
        return
    model.eval()
    with torch.no_grad(), own_code(what), autocast():
        metrics = task.evaluate(model, formatted(testing))
    _check_metrics(metrics, f"{what}: evaluate()")
    best, direction = task.best
    if best not in metrics or direction not in ("min", "max"):
        raise ValueError(
            f'{what}: best={task.best!r} must be one of the metrics {", ".join(metrics)}, and "min" or "max"'
        )


def _checked_loss(result: Any, what: str) -> tuple[Tensor, Any]:
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(f"{what}: loss() must return (loss, output), not {_description(result)}")
    loss = result[0]
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point() and loss.requires_grad):
        raise ValueError(f"{what}: the loss must be a scalar tensor with a gradient, not {_description(loss)}")
    return result


def _check_metrics(metrics: Metrics, what: str) -> None:
    if not isinstance(metrics, Mapping):
        raise ValueError(f"{what} must return a dict of (sum, count), not {_description(metrics)}")
    for name, value in metrics.items():
        if not (isinstance(name, str) and name.isidentifier()) or name in RESERVED:
            raise ValueError(f"{what}: a metric cannot be called {name!r}; use a word that is no field of the records")
        if not (isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value))):
            raise ValueError(f"{what}: {name} must be (sum, count), two numbers, not {_description(value)}")


def _is_number(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, int | float)


def _description(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_description, value))})"
    return f"{type(value).__name__} {value!r}" if isinstance(value, int | float | str) else type(value).__name__


RESERVED = frozenset(
    (
        "kind",
        "step",
        "samples",
        "progress",
        "epoch",
        "data_epoch",
        "elapsed_seconds",
        "bytes_sent",
        "data_parallel_bytes",
        "base_lr",
        "lr",
        "gain",
        "period",
        "grad_sqr",
        "grad_var",
        "divergence",
        "samples_per_second",
        "samples_per_second_per_rank",
        "remaining_seconds",
        "peak_memory_bytes",
        "peak_gpu_memory_bytes",
        "round",
    )
)
"""Fields of the records that are not the task's; docs/records.md has all."""
