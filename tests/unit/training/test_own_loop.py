"""Mistakes with `Checkpoints`, and what the state of a loop may be."""

import os
import signal

import numpy as np
import pytest
import torch

import hvdlocal
from hvdlocal.communicator import SingleProcess
from hvdlocal.training import interruption
from hvdlocal.training.user_state import UserState


@pytest.fixture
def optimizer():
    model = torch.nn.Linear(3, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    return hvdlocal.LocalOptimizer(inner, model, period=hvdlocal.ConstantPeriod(4), communicator=SingleProcess())


@pytest.fixture
def checkpoints(tmp_path, optimizer):
    def make(directory=tmp_path / "run", **settings):
        return hvdlocal.Checkpoints(directory, **{"optimizer": optimizer, **settings})

    return make


def step(optimizer):
    optimizer.zero_grad()
    optimizer.model(torch.ones(3)).sum().backward()
    optimizer.step()


def train(checkpoints, optimizer):
    for _ in range(20):
        step(optimizer)
        checkpoints.after_step()


def loader():
    return torch.utils.data.DataLoader([1, 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], 0.1)}, "optimizer is a SGD: give the hvdlocal.LocalOptimizer"),
        ({"model": torch.nn.Linear(1, 1)}, "model is a Linear and not the one that the optimizer trains"),
        ({"loader": loader()}, "'loader' is a DataLoader and cannot be restored.*StatefulDataLoader"),
        ({"state": {"best": 0.5}}, "'best' is a float and cannot be restored.*a dict of plain values"),
        ({"state": {"scheduler": torch.optim.lr_scheduler.StepLR}}, "'scheduler' is the class StepLR and cannot"),
        ({"every_steps": 0}, "every_steps=0: must be from 1"),
        ({"every_steps": 2.5}, "every_steps=2.5: must be a whole number"),
        ({"every_minutes": "5"}, "every_minutes='5': must be a number"),
        ({"every_minutes": -1.0}, "every_minutes=-1.0: must be positive"),
        ({"every_steps": 5, "every_minutes": 5.0}, "every_minutes=5.0 and every_steps=5: give one of them"),
        ({"keep": 0}, "keep=0: must be from 1"),
        ({"directory": ""}, "name a directory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_are_refused(checkpoints, settings, message):
    with pytest.raises(ValueError, match=message):
        checkpoints(**settings)


def test_calls_in_another_order(checkpoints, optimizer):
    with checkpoints() as mine:
        step(optimizer)
        with pytest.raises(ValueError, match=r"after_step\(\) before resume\(\)"):
            mine.after_step()
        with pytest.raises(ValueError, match=r"finish\(\) before resume\(\)"):
            mine.finish()
        assert mine.resume() is None
        with pytest.raises(ValueError, match=r"resume\(\) was called twice"):
            mine.resume()
        with pytest.raises(ValueError, match="has not stepped since the last call"):
            mine.after_step()
        step(optimizer)
        mine.after_step()
        assert mine.steps == 1


def test_a_directory_in_use(checkpoints, monkeypatch):
    monkeypatch.setattr("hvdlocal.training.output_directory.PATIENCE_SECONDS", 0.1)
    with checkpoints() as first, checkpoints() as second:
        first.resume()
        with pytest.raises(ValueError, match=f"in use by another run \\(process {os.getpid()}"):
            second.resume()


def test_signals_are_requests_to_stop_until_it_is_closed(checkpoints, optimizer, monkeypatch):
    monkeypatch.setattr(interruption, "_received", None)
    before = [signal.getsignal(number) for number in interruption.SIGNALS]
    with checkpoints() as mine:
        mine.resume()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(hvdlocal.Interrupted, match="SIGTERM on rank 0") as end:
            train(mine, optimizer)
    assert end.value.code == 85
    for number, handler in zip(interruption.SIGNALS, before, strict=True):
        assert signal.getsignal(number) is signal.SIG_IGN, "the end of the process is decided"
        signal.signal(number, handler)


def test_a_dict_is_restored_in_place():
    best = {"accuracy": np.float32(0.5), "history": [1, (2.0, torch.ones(2))]}
    saved = UserState({"best": best}).state_dict()
    assert type(saved["best"]["accuracy"]) is float
    best.clear()
    UserState({"best": best}).load_state_dict(saved, frozenset())
    assert best["accuracy"] == 0.5
    assert best["history"][1][0] == 2.0


@pytest.mark.parametrize("value", [np.zeros(3), {1, 2}, object()], ids=lambda value: type(value).__name__)
def test_states_that_no_checkpoint_holds(value):
    state = UserState({"mine": {"a": [0, value]}})
    with pytest.raises(ValueError, match=rf"the state of mine\['a'\]\[1\] is a {type(value).__name__}"):
        state.state_dict()


def test_states_that_differ_between_the_old_ranks():
    state = UserState({"mine": {"a": 1}, "scaler": torch.amp.GradScaler("cpu")})
    saved = state.state_dict()
    state.load_state_dict(saved, frozenset({"scaler"}))
    with pytest.raises(ValueError, match="the state of 'mine' differs between the ranks"):
        state.load_state_dict(saved, frozenset({"mine"}))


def test_a_part_that_has_changed():
    saved = UserState({"net": torch.nn.Linear(2, 2)}).state_dict()
    with pytest.raises(ValueError, match=r"'net' cannot be continued from its state.*RuntimeError.*size mismatch"):
        UserState({"net": torch.nn.Linear(3, 2)}).load_state_dict(saved, frozenset())
