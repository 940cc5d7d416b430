"""Memory that runs out is recognised in every way in which torch, NumPy and Python report it."""

import numpy as np
import pytest
import torch

from hvdlocal.training.memory import out_of_memory


@pytest.mark.parametrize(
    ("allocate", "words"),
    [
        (lambda: torch.empty(2**50), "4,194,304.0 GiB were asked for at once"),
        (lambda: torch.nn.Linear(2**45, 32), "GiB were asked for at once"),
        (lambda: torch.empty(2**62), "more was asked for than can be addressed"),
        (lambda: np.empty(2**50), "Unable to allocate 8.00 PiB"),
        (lambda: bytearray(2**60), "out of memory"),
    ],
    ids=["torch", "a layer", "too large for an address", "NumPy", "Python"],
)
def test_real_shortages(allocate, words):
    with pytest.raises((RuntimeError, MemoryError)) as error:
        allocate()
    said = out_of_memory(error.value)
    assert said is not None
    assert said.startswith("out of memory")
    assert words in said
    assert "\n" not in said


def test_a_gpu():
    said = out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has …"))
    assert said is not None
    assert said.startswith("the GPU is out of memory (CUDA out of memory): lower data.batch_size")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("can't allocate memory"), OSError(12, "x")])
def test_other_errors(error):
    assert out_of_memory(error) is None
