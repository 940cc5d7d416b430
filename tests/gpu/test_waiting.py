"""A local step that does not average never waits for the device, and an averaging waits once."""

import pytest
import torch
from waiting import counted_waits, no_waits

import hvdlocal
from hvdlocal.communicator import SingleProcess
from hvdlocal.models import build_model
from hvdlocal.training.config import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    PeriodConfig,
    TrainConfig,
)
from hvdlocal.training.optimizers import build_optimizer
from hvdlocal.training.run_length import run_length

H = 3
METHODS = {
    "local": MethodConfig("local", period=PeriodConfig(period=H)),
    "local-lin": MethodConfig("local-lin", period=PeriodConfig(period=H)),
    "local-ada": MethodConfig("local-ada", period=PeriodConfig(period=H)),
    "local-ada, exact": MethodConfig("local-ada", period=PeriodConfig(period=H), statistics="exact"),
    "local-ada, moments averaged": MethodConfig("local-ada", period=PeriodConfig(period=H), momentum="average"),
    "local-ada, moments reset": MethodConfig("local-ada", period=PeriodConfig(period=H), momentum="reset"),
    "local-ada, buffers local": MethodConfig("local-ada", period=PeriodConfig(period=H), buffers="local"),
    "local-ada, accumulating": MethodConfig("local-ada", period=PeriodConfig(period=H), accumulate=2),
    "local-ada-nostale": MethodConfig("local-ada-nostale", period=PeriodConfig(period=H)),
    "local, qsr": MethodConfig("local", period=PeriodConfig(rule="qsr", alpha=1e-4, h_base=H)),
    "local, adacomm": MethodConfig("local", period=PeriodConfig(rule="adacomm", period=H)),
    "sync": MethodConfig("sync", accumulate=2),
    "acc-lin": MethodConfig("acc-lin", period=PeriodConfig(period=H)),
    "acc-ada": MethodConfig("acc-ada", period=PeriodConfig(period=H)),
}


def training(device, method, **optimizer):
    """An optimizer of two ranks that hold the same, and a function that computes one gradient."""
    torch.manual_seed(0)
    model = build_model("digits_cnn", 10, (8, 8, 1)).to(device)
    config = TrainConfig(
        DataConfig("none"), ModelConfig("digits_cnn"), "none", optimizer=OptimizerConfig(**optimizer), method=method
    )
    wrapped = build_optimizer(config, model, run_length(config, 100, ranks=1), SingleProcess(size=2))
    x, y = torch.randn(16, 1, 8, 8).to(device), torch.randint(10, (16,)).to(device)

    def gradient():
        wrapped.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        wrapped.record_loss(loss)

    return wrapped, gradient


def averages_now(optimizer) -> bool:
    """Whether the next call of `step` is a collective."""
    if optimizer.micro_batches < optimizer.accumulate - 1:
        return False
    if isinstance(optimizer, hvdlocal.SynchronousOptimizer):
        return True
    first, stale = optimizer.steps_in_round == 0, getattr(optimizer.scaling, "stale", True)
    period = optimizer.period
    if first and optimizer.budget is not None:  # the last round may be shorter
        while (within := optimizer._progress.walk(period, period)[0]) < period:
            period = within
    return (first and not stale) or optimizer.steps_in_round == period - 1


def check_steps(device, optimizer, gradient):
    free = 0
    for micro_batch in range(4 * H * optimizer.accumulate):
        if micro_batch == 0 or averages_now(optimizer):  # the very first one also starts the device's libraries
            gradient()
            optimizer.step()
            continue
        with no_waits(device):
            gradient()
            optimizer.step()
        free += 1
    assert free >= H
    assert optimizer.round >= 2


@pytest.mark.parametrize("clip", [None, 1.0], ids=["", "clipped"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_a_step_without_a_collective_does_not_wait(device, method, clip):
    check_steps(device, *training(device, method, lr=1e-4, max_norm=clip))


def test_adamw_does_not_wait_either(device):
    if device.type == "cpu":
        pytest.skip("AdamW counts its steps on the CPU, where counting cannot be told from waiting")
    check_steps(device, *training(device, METHODS["local-ada"], name="adamw", lr=0.001))


@pytest.mark.parametrize("name", METHODS)
def test_an_averaging_waits_once(device, name):
    optimizer, gradient = training(device, METHODS[name], lr=1e-4)
    for _ in range(2 * H * optimizer.accumulate):  # into the second round
        gradient()
        optimizer.step()
    while not averages_now(optimizer):
        gradient()
        optimizer.step()
    gradient()
    with counted_waits(device) as waits:
        optimizer.step()
    # On the CPU an averaging of replicas looks with one more read whether its own is finite, which costs nothing there.
    assert len(waits) == 1 or (device.type == "cpu" and waits == ["__bool__", "tolist"])
