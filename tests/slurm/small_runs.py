"""Small runs and what they leave behind."""

from __future__ import annotations

from pathlib import Path

import torch
from support import configs
from support.faults import numbers
from support.records import records

ENDLESS = 1_000_000
"""Epochs that no test waits for."""


def write_config(directory: Path, data: Path, epochs: int = 120) -> Path:
    """A run of ten seconds or less that records every step; its output goes to `out` beside the configuration."""
    directory.mkdir(exist_ok=True)
    settings = {"epochs": epochs, "evaluate_every_epochs": 40, "log_every_seconds": 0, "device": "cpu"}
    return configs.write_config(directory / "run.yaml", data, directory / "out", **settings)


def steps_done(directory: Path) -> int:
    """The last step that the run recorded."""
    if not (directory / "metrics.jsonl").exists():
        return 0
    return max((record["step"] for record in records(directory)), default=0)


def assert_same_numbers(one: Path, two: Path) -> None:
    """Two runs ended with the same model, bit for bit, and recorded the same numbers."""
    first, second = (torch.load(directory / "model.pt", weights_only=True) for directory in (one, two))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    first, second = ([numbers(record) for record in records(directory)] for directory in (one, two))
    assert [(record["kind"], record["step"]) for record in first] == [(r["kind"], r["step"]) for r in second]
    assert [(a, b) for a, b in zip(first, second, strict=True) if a != b] == []
