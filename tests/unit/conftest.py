"""The way to real data, where there are any; and what a run in this process leaves behind."""

import os
import signal
from pathlib import Path

import pytest

from hvdlocal.training import interruption


@pytest.fixture(autouse=True)
def _signals():
    """A run ignores signals at its end, for as long as its process lives; the next test is another process, as it were."""
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    yield
    interruption.restore_handlers()
    for number, handler in before.items():
        signal.signal(number, handler)


def real_data(name: str, what: str) -> Path:
    """A directory of real data, or a skipped test."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(os.environ.get("HVDLOCAL_TEST_DATA", default)) / name
    if not path.is_dir():
        pytest.skip(f"no {what} at {path}; set HVDLOCAL_TEST_DATA to the directory that holds {name}")
    return path


@pytest.fixture(scope="session")
def cifar10_source() -> Path:
    """Directory of the real CIFAR-10, binary version."""
    return real_data("cifar-10-batches-bin", "CIFAR-10")


@pytest.fixture(scope="session")
def jpeg_source() -> Path:
    """Directory of 120 files of ImageNet: train/<class>/*.jpg, val/<class>/*.jpg, 24 classes."""
    return real_data("jpeg-sample", "sample of ImageNet")
