"""Runs that are disturbed, and runs that are not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.configs import write_config
from support.faults import Run


@pytest.fixture(scope="session")
def make(data, tmp_path_factory) -> Callable[..., Run]:
    """Runs of their own; 110 local steps on two ranks."""

    def run(*arguments: str, ranks: int = 2) -> Run:
        directory = tmp_path_factory.mktemp("run")
        output = directory / "out"
        every_step = {"log_every_seconds": 0, "checkpoint": {"every_steps": 5, "keep": 5}, "device": "cpu"}
        return Run(write_config(directory / "run.yaml", data, output, **every_step), output, ranks, arguments)

    return run


@pytest.fixture(scope="session")
def undisturbed(make) -> Callable[..., Run]:
    """Runs that nothing happens to; each is made once."""
    made: dict[Any, Run] = {}

    def run(*arguments: str, ranks: int = 2) -> Run:
        if (arguments, ranks) not in made:
            one = make(*arguments, ranks=ranks)
            assert one.start().code == 0
            made[arguments, ranks] = one
        return made[arguments, ranks]

    return run


@pytest.fixture(scope="session")
def attempt(make) -> Run:
    """A run that died after 42 steps."""
    run = make()
    run.start("kill:computing:1:43")
    assert len(run.checkpoints) >= 5
    return run


@pytest.fixture
def copied(attempt, tmp_path) -> Run:
    return replace(attempt, output=Path(shutil.copytree(attempt.output, tmp_path / "out", symlinks=True)))
