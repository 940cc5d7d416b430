"""What a user gives to `torch.set_default_dtype` and `torch.set_default_device` changes nothing (see also default_dtype.py)."""

import contextlib

import pytest
import torch
from support.models import Slope, everywhere_equal, local, mean, sgd, slopes, step

import hvdlocal


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "another device": lambda: torch.device("meta"),
}
SETTINGS = {
    "plain": {},
    "accumulate": {"accumulate": 2},
    "sketch": {"scaling": hvdlocal.LocalAdaScale(smoothing=0.0)},
    "at once": {"scaling": hvdlocal.LocalAdaScale(stale=False, statistics="exact", smoothing=0.0)},
    "momentum": {"momentum": "average"},
}


def long_round(comm, settings, default):
    model = Slope(20_000)
    with default():
        optimizer = local(model, 29, optimizer=sgd(model, lr=0.01, momentum=0.5), **settings)
        for _ in range(29 * optimizer.accumulate):
            step(optimizer, model, slopes(comm)[comm.rank])
    return model, optimizer


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("default", DEFAULTS)
def test_a_long_round(comm, default, settings):
    """29 is a number whose square bfloat16 does not hold, and 20,000 a size whose coordinates it cannot tell apart."""
    c = slopes(comm)
    model, optimizer = long_round(comm, SETTINGS[settings], DEFAULTS[default])
    moved = 0.01 * sum(2 - 0.5**i for i in range(29)) * optimizer.gain
    torch.testing.assert_close(model.w.detach(), torch.full((20_000,), 5 - moved * mean(c)))
    variance = mean([(x - mean(c)) ** 2 for x in c])
    assert optimizer.divergence == pytest.approx(20_000 * moved**2 * variance, rel=1e-3, abs=1e-3)
    usual, expected = long_round(comm, SETTINGS[settings], contextlib.nullcontext)
    assert torch.equal(model.w, usual.w)
    for name in ("gain", "grad_sqr", "grad_var", "divergence", "loss"):
        assert getattr(optimizer, name) == getattr(expected, name), name


@pytest.mark.parametrize("default", DEFAULTS)
def test_the_mean_gradient(comm, default):
    c = slopes(comm)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3, momentum=1.0), Slope())
    with DEFAULTS[default]():
        scaling = hvdlocal.AdaScale(smoothing=0.0)
        optimizer = hvdlocal.SynchronousOptimizer(sgd(model), model, accumulate=2, scaling=scaling)
        for factor in (1.0, 2.0):
            step(optimizer, model[1], factor * c[comm.rank])
    gradients = [factor * x for factor in (1.0, 2.0) for x in c]
    torch.testing.assert_close(model[1].w.detach(), torch.full((10,), 5 - optimizer.gain * mean(gradients)))
    grad_var = hvdlocal.gradient_statistics(
        10 * mean([g * g for g in gradients]), 10 * mean(gradients) ** 2, len(gradients)
    )[1]
    assert optimizer.grad_var == pytest.approx(grad_var, rel=1e-5)
    model[0](torch.tensor([[0.0], [2.0]]).expand(2, 3) + comm.rank)
    with DEFAULTS[default]():
        optimizer.synchronize()
    torch.testing.assert_close(model[0].running_mean, torch.full((3,), 1.0 + mean(range(comm.size))))
    assert everywhere_equal(comm, model[0].running_var)
