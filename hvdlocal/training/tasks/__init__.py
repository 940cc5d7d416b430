"""Tasks by name and by import path."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from hvdlocal.import_path import call, is_import_path
from hvdlocal.training.config import TrainConfig
from hvdlocal.training.tasks.base import Batch, DataDescription, Metrics, Task
from hvdlocal.training.tasks.image_classification import ImageClassification
from hvdlocal.training.tasks.language_model import LanguageModel
from hvdlocal.training.tasks.regression import Regression

__all__ = [
    "TASKS",
    "Batch",
    "DataDescription",
    "ImageClassification",
    "LanguageModel",
    "Metrics",
    "Regression",
    "Task",
    "build_task",
]

TASKS: dict[str, Callable[..., Task]] = {
    "image-classification": ImageClassification,
    "language-model": LanguageModel,
    "regression": Regression,
}
"""The tasks that a configuration can name."""


def build_task(config: TrainConfig) -> Task:
    """Builds the task that a configuration names.

    Raises:
        ValueError: there is no such task, or it does not take the arguments.
    """
    name, arguments = config.task, dict(config.task_arguments)
    if is_import_path(name):
        task = call(name, "task", arguments=arguments)
        if not isinstance(task, Task):
            raise ValueError(f"task={name}: it is {type(task).__name__}; a task is a subclass of hvdlocal.Task")
        return task
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"task={name}: {hint}choose one of {', '.join(TASKS)}, or your own as package.module:Class")
    if name == "image-classification":
        arguments = {"label_smoothing": config.label_smoothing, "image_size": config.data.image_size} | arguments
    kind = TASKS[name]
    return call(f"{kind.__module__}:{kind.__qualname__}", "task", arguments=arguments)
