"""`hvdlocal.train`: the trainer from a script, with objects in place of names."""

import json
import signal

import pytest
import torch
from support.datasets import write_three_classes

import hvdlocal
from hvdlocal.communicator import SingleProcess
from hvdlocal.training import interruption
from hvdlocal.training.tasks import Task


class Brightness(Task):
    """Learns the mean of an image."""

    best = ("error", "min")

    def loss(self, model, batch):
        images, _ = batch
        output = model(images.flatten(1))[:, 0]
        return (output - images.flatten(1).mean(1)).square().mean(), output

    def metrics(self, output, batch):
        return {"error": ((output - batch[0].flatten(1).mean(1)).abs().sum(), len(output))}


@pytest.fixture
def settings(tmp_path):
    write_three_classes(tmp_path / "data")
    return {
        "data": {"path": tmp_path / "data", "batch_size": 8},
        "output": tmp_path / "out",
        "epochs": 2,
        "device": "cpu",
        "optimizer": {"lr": 0.01},
    }


def test_objects_take_the_place_of_names(settings, tmp_path):
    model = torch.nn.Linear(64, 1)
    before = signal.getsignal(signal.SIGTERM)
    start = model.weight.detach().clone()
    summary = hvdlocal.train(settings, task=Brightness(), model=model, communicator=SingleProcess())
    assert signal.getsignal(signal.SIGTERM) is before
    assert not torch.equal(model.weight, start), "the given model itself is trained"
    saved = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert torch.equal(saved["weight"], model.weight)
    assert 0 <= summary.evaluation.metrics["error"] < 1
    recorded = hvdlocal.load_config(tmp_path / "out" / "config.yaml")
    assert recorded.task == f"{__name__}:Brightness"
    assert recorded.model.name == "torch.nn.modules.linear:Linear"
    assert json.loads((tmp_path / "out" / "environment.json").read_text())["ranks"] == 1

    again = hvdlocal.load_config(settings, {"task": "image-classification", "model.name": "digits_cnn"})
    try:
        with pytest.raises(hvdlocal.AlreadyFinished) as end:
            hvdlocal.train(again, task=Brightness(), model=torch.nn.Linear(64, 1), communicator=SingleProcess())
        assert end.value.code == 0
    finally:  # the end of the process was decided
        for number in interruption.SIGNALS:
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    with pytest.raises(ValueError, match=r"holds an earlier run with model\.name=.*Linear, not digits_cnn"):
        hvdlocal.train(again, communicator=SingleProcess())


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"task": Brightness}, "task is the class Brightness: give an instance of a subclass of hvdlocal.Task"),
        ({"model": torch.nn.Linear}, "model is the class Linear: give an instance of a subclass of torch.nn.Module"),
        ({}, r"required: model\.name"),
    ],
)
def test_mistakes_before_anything_is_written(settings, tmp_path, objects, message):
    with pytest.raises(ValueError, match=message):
        hvdlocal.train(settings, **objects, communicator=SingleProcess())
    assert not (tmp_path / "out").exists()


def test_a_trainer_needs_a_configuration(settings):
    with pytest.raises(ValueError, match=r"config is a dict: hvdlocal\.load_config makes a TrainConfig"):
        hvdlocal.Trainer(settings, SingleProcess())
