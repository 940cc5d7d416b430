"""Configurations of small runs on `datasets.write_three_classes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hvdlocal.training.config import DataConfig, ModelConfig, TrainConfig


def digits_config(data: str | Path = "data", output: str | Path = "out", **settings: Any) -> TrainConfig:
    """Returns a configuration of the digits network; `settings` are TrainConfig's, or DataConfig's as `data_NAME`."""
    reading = {name.removeprefix("data_"): settings.pop(name) for name in list(settings) if name.startswith("data_")}
    settings = {"model": ModelConfig("digits_cnn"), **settings}
    return TrainConfig(data=DataConfig(str(data), **reading), output=str(output), **settings)


def write_config(path: Path, data: Path, output: Path, **settings: Any) -> Path:
    """Writes the YAML file of a run that learns the three classes on two ranks in about a second, and returns its path."""
    run = {
        "data": {"path": str(data), "batch_size": 8},
        "model": {"name": "digits_cnn"},
        "optimizer": {"lr": 0.02, "weight_decay": 1e-4},
        "epochs": 6,
        "output": str(output),
        **settings,
    }
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path
