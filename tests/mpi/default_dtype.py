"""TEST_DEFAULT_DTYPE=bfloat16 or float64: every call into an optimizer is made under that default dtype of torch, while the tests
and their models stay in float32.
"""

import functools
import os

import pytest
import torch

import hvdlocal

CALLS = (
    "__init__",
    "_take_gradient",
    "synchronize",
    "reestimate_buffers",
    "record_loss",
    "state_dict",
    "load_state_dict",
)
DTYPE = os.environ.get("TEST_DEFAULT_DTYPE")


def under(dtype, function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)

    return call


@pytest.fixture(autouse=DTYPE is not None)
def _another_default_dtype(monkeypatch):
    """The torch optimizer inside is none of hvdlocal's, so its step is under the usual default again."""
    for cls in (hvdlocal.LocalOptimizer, hvdlocal.SynchronousOptimizer):
        for name in CALLS:
            monkeypatch.setattr(cls, name, under(getattr(torch, DTYPE), getattr(cls, name)))
    for cls in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        monkeypatch.setattr(cls, "step", under(torch.float32, cls.step))
