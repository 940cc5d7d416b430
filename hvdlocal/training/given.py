"""Objects that a script gives in place of names in the configuration, which then records their classes by import path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from hvdlocal.training.config import TrainConfig
from hvdlocal.training.tasks import Task


def names_of(task: Task | None, model: nn.Module | None) -> dict[str, str]:
    """Returns the settings that name the classes of the given objects.

    Raises:
        ValueError: one of them is no task or no model.
    """
    found = {}
    for setting, given, kind, wanted in (
        ("task", task, Task, "hvdlocal.Task"),
        ("model", model, nn.Module, "torch.nn.Module"),
    ):
        if given is None:
            continue
        if not isinstance(given, kind):
            what = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
            raise ValueError(f"{setting} is {what}: give an instance of a subclass of {wanted}")
        found["task" if setting == "task" else "model.name"] = _import_path(given)
    return found


def with_names(config: TrainConfig, task: Task | None, model: nn.Module | None) -> TrainConfig:
    """Returns the configuration with the names of the given objects.

    Raises:
        ValueError: as `names_of`, or the configuration is none.
    """
    if not isinstance(config, TrainConfig):
        raise ValueError(
            f"config is a {type(config).__name__}: hvdlocal.load_config makes a TrainConfig of a file or a dict"
        )
    names = names_of(task, model)
    if "task" in names:
        config = replace(config, task=names["task"], task_arguments={})
    if "model.name" in names:
        config = replace(config, model=replace(config.model, name=names["model.name"], arguments={}))
    return config


def _import_path(given: Any) -> str:
    kind = type(given)
    return f"{kind.__module__}:{kind.__qualname__}"
