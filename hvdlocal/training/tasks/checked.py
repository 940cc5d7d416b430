"""A user's task, with checks of everything that it returns and with its errors as one sentence."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hvdlocal.import_path import OwnCodeError, own_code
from hvdlocal.training.config import ModelConfig
from hvdlocal.training.tasks.base import Batch, DataDescription, Metrics, Task

RECORD_FIELDS = frozenset(
    (
        "kind",
        "step",
        "samples",
        "progress",
        "epoch",
        "data_epoch",
        "bytes_sent",
        "island_bytes_sent",
        "data_parallel_bytes",
        "base_lr",
        "lr",
        "gain",
        "period",
        "grad_sqr",
        "grad_var",
        "divergence",
        "round",
    )
)
"""Fields of the records that are not the task's, beside those that begin with `loader_` or `samples_`, or end with
`_seconds` or `_bytes`; docs/records.md has all."""


class CheckedTask(Task):
    """Passes every call on to a task that uses a user's own code.

    Args:
        task: the task.
        what: the settings that name the code, for messages.

    Raises:
        OwnCodeError: from every method: the code raised an error, or returned something else than it should.
    """

    def __init__(self, task: Task, what: str) -> None:
        best = task.best
        if not (isinstance(best, tuple) and len(best) == 2 and isinstance(best[0], str) and best[1] in ("min", "max")):
            raise OwnCodeError(f'{what}: best={best!r} must be the name of a metric and "min" or "max"')
        self.best = best  # type: ignore[misc]
        self.percent = task.percent  # type: ignore[misc]
        self._task = task
        self._what = what

    def build_model(self, model: ModelConfig, data: DataDescription) -> nn.Module:
        """See `Task`."""
        with own_code(self._what):
            return self._task.build_model(model, data)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """See `Task`."""
        with own_code(self._what):
            result = self._task.loss(model, batch)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise OwnCodeError(f"{self._what}: loss() must return (loss, output), not {_description(result)}")
        loss, output = result
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()):
            raise OwnCodeError(
                f"{self._what}: the loss must be a scalar tensor with a gradient, not {_description(loss)}"
            )
        return loss.reshape(()), output

    def metrics(self, output: Any, batch: Batch) -> Metrics:
        """See `Task`."""
        with own_code(self._what):
            metrics = self._task.metrics(output, batch)
        found = self._checked(metrics, "metrics()")
        if "loss" in found:
            raise OwnCodeError(f"{self._what}: metrics() must not return the loss, which is recorded anyway; rename it")
        return found

    def evaluate(self, model: nn.Module, batch: Batch) -> Metrics:
        """See `Task`."""
        with own_code(self._what):
            metrics = self._task.evaluate(model, batch)
        found = self._checked(metrics, "evaluate()")
        if self.best[0] not in found:
            raise OwnCodeError(f"{self._what}: best={self.best!r} must be one of the metrics {', '.join(found)}")
        return found

    def _checked(self, metrics: Metrics, where: str) -> Metrics:
        what = f"{self._what}: {where}"
        if not isinstance(metrics, Mapping):
            raise OwnCodeError(f"{what} must return a dict of (sum, count), not {_description(metrics)}")
        found: Metrics = {}
        for name, value in metrics.items():
            if not (isinstance(name, str) and name.isidentifier()) or is_record_field(name):
                raise OwnCodeError(
                    f"{what}: a metric cannot be called {name!r}; use a word that is no field of the records"
                )
            pair = tuple(map(_number, value)) if isinstance(value, tuple) and len(value) == 2 else (None,)
            if None in [one if one is None else 0 for one in pair]:
                raise OwnCodeError(f"{what}: {name} must be (sum, count), two numbers, not {_description(value)}")
            found[name] = pair  # type: ignore[assignment]
        return found


def is_record_field(name: str) -> bool:
    """Returns whether the records have a field of this name."""
    return name in RECORD_FIELDS or name.startswith(("loader_", "samples_")) or name.endswith(("_seconds", "_bytes"))


def _number(value: Any) -> Tensor | float | None:
    """Returns a number or a real tensor of one; None for everything else."""
    if isinstance(value, Tensor):
        return None if value.numel() != 1 or value.is_complex() else value.detach().reshape(())
    if not isinstance(value, numbers.Real):
        return None
    try:
        return value if isinstance(value, int) and abs(value) < 2**53 else float(value)
    except OverflowError:
        return math.inf


def _description(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_description, value))})"
    return f"{type(value).__name__} {value!r}" if isinstance(value, int | float | str) else type(value).__name__
