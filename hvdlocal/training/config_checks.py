"""What follows from the facts declared in `config`: which configurations are refused, which settings count in a run."""

from __future__ import annotations

import difflib
from typing import Any

from hvdlocal.import_path import is_import_path
from hvdlocal.training.config import SETTINGS, CheckpointConfig, TrainConfig, flatten
from hvdlocal.training.method_checks import check_method
from hvdlocal.training.settings import Range

NAMES = {"optimizer.name": ("sgd", "adamw"), "schedule.name": ("constant", "cosine", "linear", "step")}
"""What settings may name beside import paths."""


def check_ranges(config: TrainConfig) -> None:
    """Refuses values that no run can have; what depends on the data or the ranks is checked where it is used.

    Raises:
        ValueError: naming the setting, its value and what it may be.
    """
    for name, value in flatten(config).items():
        _check_range(name, value, SETTINGS[name].range)
    for name, choices in NAMES.items():
        chosen = flatten(config)[name]
        if chosen not in choices and not is_import_path(chosen):
            near = difflib.get_close_matches(chosen, choices, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"{name}={chosen}: {hint}choose one of {', '.join(choices)}, or your own as package.module:name"
            )
    for name, value in flatten(config).items():
        if name.endswith("arguments") and not all(isinstance(key, str) and key.isidentifier() for key in value):
            raise ValueError(f"{name}={value}: the names of arguments must be words")
    if config.data.transform is not None and not is_import_path(config.data.transform):
        raise ValueError(f"data.transform={config.data.transform}: name your own transform as package.module:Class")
    for name, path in (("data.path", config.data.path), ("output", config.output)):
        if not path:
            raise ValueError(f"{name}={path!r}: name a directory")
        if "\0" in path:
            raise ValueError(f"{name}={path!r}: a path has no zero byte")
    check_method(config.method)
    check_checkpoints(config.checkpoint, "checkpoint.")


def check_checkpoints(config: CheckpointConfig, prefix: str = "") -> None:
    """Refuses intervals that no run can have.

    Args:
        config: when to write checkpoints.
        prefix: goes before the names of the settings in messages.

    Raises:
        ValueError: naming the setting, its value and what it may be.
    """
    for name, value in vars(config).items():
        setting = SETTINGS[f"checkpoint.{name}"]
        if value is None and setting.nullable:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and not (isinstance(value, float) and setting.type in (float, float | None)):
            raise ValueError(
                f"{prefix}{name}={value!r}: must be a {'whole ' * (setting.type in (int, int | None))}number"
            )
        _check_range(f"{prefix}{name}", value, setting.range)
    if config.every_steps is not None and config.every_minutes is not None:
        raise ValueError(
            f"{prefix}every_minutes={config.every_minutes} and {prefix}every_steps={config.every_steps}: give one of them"
        )


def _check_range(name: str, value: Any, allowed: Range | None) -> None:
    if value is None or isinstance(value, str):  # a word in place of a number, which its type has allowed
        return
    numbers = value if isinstance(value, tuple) else (value,)
    if allowed is not None and not all(map(allowed.holds, numbers)):
        raise ValueError(f"{name}={value}: must be {allowed}")


def unused_settings(config: TrainConfig) -> list[str]:
    """Settings that differ from their defaults and have no effect with the chosen preset, rule, optimizer and schedule.

    They are not refused: comparing two presets should take one changed word. They are named at the start of a run.
    """
    return [
        f"{name}={value}"
        for name, value in flatten(config).items()
        if not SETTINGS[name].has_effect(config) and value != SETTINGS[name].default
    ]


def effective_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that have an effect in this run, by their dotted names: those that a continued run must share."""
    return {name: value for name, value in flatten(config).items() if SETTINGS[name].has_effect(config)}
