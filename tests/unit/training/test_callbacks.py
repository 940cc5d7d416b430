"""Callbacks see every event of a run, in order, and cannot change what it computes."""

import importlib
import json
import sys
from collections import Counter

import pytest
import torch
from support.configs import digits_config
from support.datasets import write_three_classes

import hvdlocal
from hvdlocal.communicator import SingleProcess
from hvdlocal.training import CallbackError, Trainer
from hvdlocal.training.callbacks.build import TRACKERS
from hvdlocal.training.config import CheckpointConfig, MethodConfig, PeriodConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write_three_classes(directory)
    return directory


@pytest.fixture
def train(data, tmp_path):
    """Trains two epochs of 12 steps in rounds of 4, with a checkpoint after 10 and 20 steps, and returns the summary."""

    def train(*callbacks, output="out", **settings):
        config = digits_config(
            data,
            tmp_path / output,
            data_batch_size=8,
            epochs=2.0,
            method=MethodConfig("local", PeriodConfig(period=4)),
            checkpoint=CheckpointConfig(every_steps=10),
            log_every_seconds=1e6,
            **settings,
        )
        return Trainer(config, SingleProcess(), callbacks=callbacks).run()

    return train


class Witness(hvdlocal.Callback):
    """Notes every event."""

    def __init__(self):
        self.seen = []

    def on_start(self, run):
        self.seen.append(("start", run.step))

    def on_step(self, run):
        self.seen.append(("step", run.step))

    def on_log(self, run, record):
        self.seen.append(("log", record["step"]))

    def on_round(self, run, record):
        self.seen.append(("round", record["round"]))

    def on_evaluation(self, run, record):
        self.seen.append(("evaluation", run.epoch))

    def on_checkpoint(self, run, path):
        assert (path / "manifest.json").exists()
        self.seen.append(("checkpoint", path.name))

    def on_end(self, run, outcome, summary):
        self.seen.append((outcome, summary and summary["steps"]))


def test_the_events_of_a_run(train):
    witness = Witness()
    train(witness)
    expected = [("start", 0)]
    for step in range(1, 25):
        expected.append(("step", step))
        if step % 4 == 0:
            expected.append(("round", step // 4))
        if step == 12:
            expected.append(("evaluation", 1.0))
    expected += [("log", 24), ("evaluation", 2.0), ("finished", 24)]
    # A checkpoint is reported when the thread has written it: at the next one at the latest.
    assert [event for event in witness.seen if event[0] != "checkpoint"] == expected
    checkpoints = [name for event, name in witness.seen if event == "checkpoint"]
    assert checkpoints == ["step-0000000010", "step-0000000020"]


def test_the_view_of_a_run(train, tmp_path):
    class Look(hvdlocal.Callback):
        def on_start(self, run):
            assert (run.rank, run.num_workers, run.directory) == (0, 1, tmp_path / "out")
            assert run.resumed_step is None
            assert len(run.run_id) == 16
            assert run.config["method"]["period"]["period"] == 4
            assert sum(p.numel() for p in run.model.parameters()) > 0
            run.config["epochs"] = 99  # a copy

    assert train(Look()).scale_invariant_epochs == 2


class Meddler(hvdlocal.Callback):
    """Draws random numbers, computes with the model and leaves it in evaluation mode."""

    def on_step(self, run):
        run.model.eval()
        run.model(torch.rand(2, 1, 8, 8))

    on_start = on_step


def test_random_numbers_and_modes_are_restored(train, tmp_path):
    train(Meddler(), output="one")
    train(output="two")
    one, two = (torch.load(tmp_path / name / "model.pt") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


class Count(hvdlocal.Callback):
    """Counts steps, across interruptions."""

    def __init__(self, fails_at=None):
        self.count, self.fails_at, self.states = 0, fails_at, []

    def on_step(self, run):
        self.count += 1
        if self.count == self.fails_at:
            raise OSError("no room left for plots")

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.states.append(state)
        self.count = state["count"]


def test_a_failure_ends_the_run_with_a_checkpoint_and_it_continues(train, tmp_path):
    witness = Witness()
    with pytest.raises(CallbackError) as failed:
        train(Count(fails_at=3), witness)
    told = str(failed.value)
    assert told.startswith("callback Count, on_step after step 3: OSError: no room left for plots (in ")
    assert 'raise OSError("no room left for plots")' in told
    (event, name), end = witness.seen[-2:]
    assert (event, end) == ("checkpoint", ("interrupted", None))
    assert f"the same command continues from the checkpoint of step {int(name[-10:])}" in told
    assert train(Count()).steps == 24


def test_state_goes_into_checkpoints(train, tmp_path):
    first = Count()
    train(first)
    (tmp_path / "out" / "summary.json").unlink()  # as if it had been killed in its last moments
    second = Count()
    train(second)
    assert second.states == [{"count": 20}]
    assert (first.count, second.count) == (24, 24)


def scale(model):
    next(model.parameters()).mul_(2)


def scale_data(model):
    next(model.parameters()).data.mul_(0.5)


def replace_data(model):
    first = next(model.parameters())
    first.data = first.data.clone()


def forget_gradients(model):
    model.zero_grad()


def freeze(model):
    model.requires_grad_(False)


def count_a_batch(model):
    next(model.buffers()).add_(1)


def update_statistics(model):
    model.train()
    model(torch.rand(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("change", "event", "named"),
    [
        (scale, "on_evaluation", "parameter "),
        (scale_data, "on_start", "parameter "),
        (scale_data, "on_step", "parameter "),
        (scale_data, "on_round", "parameter "),
        (scale_data, "on_end", "parameter "),
        (replace_data, "on_round", "parameter "),
        (freeze, "on_step", "parameter "),
        (forget_gradients, "on_step", "gradient of "),
        (count_a_batch, "on_checkpoint", "buffer "),
        (update_statistics, "on_round", "buffer "),
    ],
)
def test_the_model_is_not_for_callbacks_to_change(train, change, event, named):
    class Change(hvdlocal.Callback):
        pass

    setattr(Change, event, lambda self, run, *others: change(run.model))
    with pytest.raises(
        CallbackError, match=rf"^callback .*Change, {event} after step \d+: it changed the model"
    ) as failed:
        train(Change())
    assert f"({named}" in str(failed.value)
    assert "line" not in str(failed.value)


def test_a_later_change_is_found_too(train):
    class Change(hvdlocal.Callback):
        def on_step(self, run):
            if run.step == 7:
                scale(run.model)

    class ChangeData(hvdlocal.Callback):
        def on_evaluation(self, run, record):
            if run.step == 24:
                scale_data(run.model)

    with pytest.raises(CallbackError, match="on_step after step 7: it changed the model"):
        train(Change(), output="one")
    with pytest.raises(CallbackError, match="on_evaluation after step 24: it changed the model"):
        train(ChangeData(), output="two")


def test_a_module_trains_on_after_a_callback_that_failed(train):
    class Evaluates(hvdlocal.Callback):
        def on_step(self, run):
            self.model = run.model
            run.model.eval()
            raise OSError("no room left")

    callback = Evaluates()
    with pytest.raises(CallbackError, match="no room left"):
        train(callback)
    assert all(module.training for module in callback.model.modules())


def test_a_failure_at_the_start_is_before_training(train):
    class Late(hvdlocal.Callback):
        def on_start(self, run):
            raise KeyError("token")

    witness = Witness()
    with pytest.raises(CallbackError, match=r"callback .*Late, on_start after step 0: KeyError: 'token'"):
        train(Late(), witness)
    assert witness.seen == [("start", 0), ("failed", None)]


def test_a_failure_at_the_end_is_reported_too(train):
    class Last(hvdlocal.Callback):
        def on_end(self, run, outcome, summary):
            raise RuntimeError("the server does not answer")

    with pytest.raises(
        CallbackError, match=r"on_end after step 24: RuntimeError: the server does not answer .* is finished"
    ):
        train(Last())


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ({"weights": torch.zeros(3)}, "Object of type Tensor is not JSON serializable"),
        ({"loss": float("nan")}, "Out of range float values are not JSON compliant"),
        ([1], r"it returned \[1\]"),
        (None, "it returned None"),
    ],
)
def test_a_state_that_json_cannot_hold_is_found_at_the_start(train, state, problem):
    class Big(hvdlocal.Callback):
        def state_dict(self):
            return state

    told = (
        rf"Big, state_dict after step 0: it must return a dict that JSON can hold: {problem}.*; training has not begun"
    )
    with pytest.raises(CallbackError, match=told) as failed:
        train(Big())
    assert "json/" not in str(failed.value)


def test_a_state_that_json_cannot_hold_later(train):
    class Grows(hvdlocal.Callback):
        def __init__(self):
            self.losses = []

        def on_step(self, run):
            self.losses.append(torch.zeros(1))

        def state_dict(self):
            return {"losses": self.losses}

    with pytest.raises(CallbackError, match=r"state_dict after step 10: it must return a dict that JSON can hold"):
        train(Grows())


CODE = """
import hvdlocal

class Note(hvdlocal.Callback):
    made = []

    def __init__(self, every=1):
        assert every > 0, "every must be positive"
        Note.made.append(every)

class Other:
    pass
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_callbacks.py").write_text(CODE)
    yield importlib.import_module("my_callbacks")
    del sys.modules["my_callbacks"]


def test_callbacks_by_import_path(train, module):
    train(callbacks=["my_callbacks:Note", {"name": "my_callbacks:Note", "arguments": {"every": 3}}])
    assert module.Note.made == [1, 3]


def test_the_code_of_callbacks_is_recorded_and_compared(train, module, tmp_path, capsys):
    settings = {"callbacks": ["my_callbacks:Note", {"name": "my_callbacks:Note"}, "tensorboard"]}
    train(**settings)
    manifest, *_ = sorted((tmp_path / "out" / "checkpoints").glob("*/manifest.json"))
    assert list(json.loads(manifest.read_text())["code"]) == ["my_callbacks"]
    (tmp_path / "out" / "summary.json").unlink()  # as if it had been killed in its last moments
    (tmp_path / "my_callbacks.py").write_text(f"{CODE}# edited\n")
    capsys.readouterr()
    train(**settings)
    assert "note: your own code has changed since the checkpoint: my_callbacks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("wandbb", "callbacks=wandbb: did you mean 'wandb'"),
        ("my_callbacks:Not", "callbacks=my_callbacks:Not: .*did you mean 'Note'"),
        ("my_callbacks:Other", "callbacks=my_callbacks:Other: it must be a subclass of hvdlocal.Callback"),
        ({"name": "my_callbacks:Note", "arguments": {"evry": 3}}, "evry"),
        ({"name": "my_callbacks:Note", "arguments": {"every": 0}}, "AssertionError: every must be positive"),
        ({"name": "my_callbacks:Note", "args": {}}, "an entry is a name, or a mapping of name and arguments"),
        ({"arguments": {}}, "an entry is a name, or a mapping of name and arguments"),
        (3, "callbacks=3: an entry is a name, or a mapping of name and arguments"),
        (None, "callbacks=None: an entry is a name, or a mapping of name and arguments"),
        (["wandb"], r"callbacks=\['wandb'\]: an entry is a name, or a mapping of name and arguments"),
    ],
)
def test_mistakes_are_found_before_training(train, module, tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        train(callbacks=[entry])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([Witness], "callbacks has the class Witness: give instances"),
        ([Witness(), None], "callbacks has None: give instances"),
        (["wandb"], "callbacks has 'wandb': give instances"),
        (Witness, "callbacks is the class Witness: give a list"),
        (Witness(), "callbacks is <.*Witness object.*>: give a list"),
        ("wandb", "callbacks is 'wandb': give a list"),
        (None, "callbacks is None: give a list"),
    ],
)
def test_what_a_script_gives_must_be_a_list_of_callbacks(data, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        Trainer(digits_config(data, tmp_path / "out"), SingleProcess(), callbacks=given)
    assert not (tmp_path / "out").exists()


def test_a_directory_is_no_installed_package(train, tmp_path, monkeypatch):
    (tmp_path / "tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(TRACKERS, "tracker", "my_callbacks:Note")
    with pytest.raises(ImportError, match=r"callbacks=tracker needs the package tracker: pip install"):
        train(callbacks=["tracker"])


def test_what_is_not_overridden_is_not_called(train, monkeypatch):
    calls = Counter()
    monkeypatch.setattr(hvdlocal.Callback, "on_step", lambda self, run: calls.update(["step"]))

    class Quiet(hvdlocal.Callback):
        pass

    train(Quiet())
    assert not calls
