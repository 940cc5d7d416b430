"""A small data set and a configuration of a run on it; support/launch.py starts jobs."""

from pathlib import Path

import pytest
from support.configs import write_config
from support.datasets import write_three_classes


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The data set of `write_three_classes`."""
    directory = tmp_path_factory.mktemp("data")
    write_three_classes(directory)
    return directory


@pytest.fixture
def config(data, tmp_path) -> Path:
    """The file of a small run, whose output goes to `out` beside it."""
    return write_config(tmp_path / "run.yaml", data, tmp_path / "out", evaluate_every_epochs=3)
