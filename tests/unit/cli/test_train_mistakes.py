"""Wrong settings of `hvdlocal train`: exit code 2 and one sentence with the value and the remedy, nothing written."""

import json
import re

import numpy as np
import pytest
import torch
from support.records import records

import hvdlocal
from data_prep.__main__ import main as data_prep
from hvdlocal.cli import main
from hvdlocal.communicator import SingleProcess
from hvdlocal.models import MODELS
from hvdlocal.training.step import TrainingStep


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs `hvdlocal train` on a small data set with more arguments."""
    for split, count in (("train", 24), ("test", 9)):
        images = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 1), dtype=np.uint8)
        hvdlocal.ShardWriter(tmp_path / "data", split, classes=["a", "b"]).write(images, np.arange(count) % 2)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {{path: {tmp_path}/data, batch_size: 8}}\nmodel: {{name: digits_cnn}}\noutput: {tmp_path}/out\n"
    )
    monkeypatch.setattr("hvdlocal.communicator.launch._current", SingleProcess())
    return lambda *arguments: main(["train", str(config), *arguments])


MISTAKES = [
    (["--method.presett", "sync"], "no key 'method.presett': did you mean 'method.preset'?"),
    (["--optimizer.lr", "fast"], "Got value: fast"),
    (["--method.preset", "local-sgd"], "Got value: local-sgd"),
    (["--data.path", "/nowhere"], "/nowhere"),
    (["--model.name", "resnet5"], "no model 'resnet5': did you mean 'resnet50'?"),
    (["--model.name", "resnet50"], "3 channels, not 1"),
    (["--epochs", "0"], "epochs=0"),
    (["--data.batch_size", "0"], "batch_size"),
    (["--method.period.period", "0"], "period=0"),
    (["--method.period.rule", "qsr"], "rule=qsr needs method.period.alpha"),
    (["--method.period.alpha", "0.1"], "alpha=0.1 has no meaning for rule constant"),
    (["--method.preset", "acc-ada", "--method.accumulate", "4"], "leave method.accumulate at 1"),
    (["--schedule.warmup_epochs", "99"], "warmup_epochs=99"),
    (["--threads", "0"], "threads=0"),
    (["--label_smoothing", "1.5"], "label_smoothing=1.5"),
    (["--optimizer.lr", "-1"], "optimizer.lr=-1"),
    (["--method.sketch_size", "4"], "sketch_size=4"),
    (["--tensorboard", "maybe"], "maybe"),
    (["--data.image_size", "4", "--data.crop_padding", "1"], "two ways of cropping"),
    (["--data.randaugment", "31"], "data.randaugment=31: must be from 0 to 30"),
    (["--data.mixup", "-1"], "data.mixup=-1.0: must be from 0 to 1,000"),
    (["--data.threads", "0"], "data.threads=0: must be from 1 to 1,024"),
    (["--data.storage", "disk"], "Got value: disk"),
    (["--data.image_size", "3"], "digits_cnn cannot take images of 3×3 pixels"),
    (["--data.image_size", "1"], "set data.image_size to 4 or more, or choose another model"),
    (["--model.name", "resnet18_cifar", "--data.batch_size", "1"], "let every batch of a rank hold at least 2 images"),
    (["--model.name", "resnet18_cifar", "--data.batch_size", "23", "--data.tail", "partial"], "on a batch of 1 of 8×8"),
    (["--schedule.step_factor", "1e30"], "schedule.step_factor=1e+30: must be positive, and at most 1"),
    (["--threads="], "threads: Expected a whole number or null. Got value:"),
    (["--threads=true"], "threads: Expected a whole number or null. Got value: true"),
    (["--method.smoothing=-"], "method.smoothing: Expected a number or null. Got value: -"),
    (["--optimizer.betas=[1,2,3]"], "optimizer.betas: Expected a list of 2 values. Got value: [1, 2, 3]"),
    (["--data.image_size", "None"], "data.image_size: Expected a whole number or null. Got value: None"),
    (["--seed", "null"], "seed: Expected a whole number. Got value: null"),
    (["surplus"], "surplus is not a setting; one is written --section.key value"),
    (["--output", "a\0b"], "output='a\\x00b': a path has no zero byte"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_wrong_settings(run, tmp_path, capsys, arguments, message):
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("hvdlocal")
    assert message in said
    assert said.count("\n") == 1
    assert not re.search("<class|typing|NoneType|Errno", said), "words of Python"
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["nosuch.yaml", "/", "run.yaml/x"])
def test_a_configuration_that_cannot_be_read(run, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert main(["train", name]) == 2
    said = capsys.readouterr().err
    assert f"{name}" in said
    assert said.endswith(("from where the job starts\n", "give the path of a YAML file\n"))
    assert "Errno" not in said


def test_no_memory_for_the_model(run, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "huge", huge)
    assert run("--model.name", "huge") == 2
    said = capsys.readouterr().err
    assert said.startswith("hvdlocal: model.name=huge on 8×8 pixels: out of memory (")
    assert said.count("\n") == 1


def huge(num_classes, shape):
    """Two layers of which the first, four petabytes large, is used by no forward pass."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))
    model.unused = torch.nn.Linear(2**40, 2**10)
    model.forward = lambda x: model[1](model[0](x))
    return model


def test_no_memory_in_training(run, tmp_path, monkeypatch, capsys):
    """It is a sentence, and no bug of hvdlocal: exit code 1, and the same command goes on."""

    def compute(self, batch):
        torch.empty(2**50)

    monkeypatch.setattr(TrainingStep, "compute", compute)
    assert run() == 1
    said = capsys.readouterr().err
    assert (
        "cannot go on after step 0: out of memory (4,194,304.0 GiB were asked for at once): lower data.batch_size"
        in said
    )
    assert f"mended: {tmp_path}/out holds no checkpoint to continue from yet, so the same command begins anew." in said
    assert "Traceback" not in said


def test_jpegs_need_a_size(run, tmp_path, capsys):
    assert data_prep(["synthetic", "--jpeg", "--output", f"{tmp_path}/jpegs", "--samples", "30", "--size", "24"]) == 0
    jpegs = ["--data.path", f"{tmp_path}/jpegs", "--model.name", "resnet9_narrow", "--epochs", "2"]
    assert run(*jpegs) == 2
    assert "set data.image_size" in capsys.readouterr().err
    assert run(*jpegs, "--data.image_size", "16", "--data.randaugment", "9", "--data.mixup", "0.2") == 0
    last = records(tmp_path / "out", "steps")[-1]
    assert last["loader_samples"] >= 2 * 20
    assert last["loader_decode_rate"] > 0
    assert "simplejpeg" in json.loads((tmp_path / "out" / "environment.json").read_text())["decoder"]


def test_the_same_without_a_mistake(run, tmp_path, capsys):
    assert run("--epochs", "1") == 0
    assert (tmp_path / "out" / "model.pt").exists()
    assert "local-ada on 1 rank" in capsys.readouterr().out


def test_settings_without_effect_are_said(run, capsys):
    assert run("--epochs", "1", "--method.preset", "sync", "--method.c", "0.5") == 0
    assert "note: without effect in this run: method.c=0.5" in capsys.readouterr().out


def test_unknown_keys_in_a_file(run, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: {name: digits_cnn, width: 3}\ndata: {path: x}\noutput: y\n")
    assert run() == 2
    assert "there is no key 'model.width'" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("model: {name: digits_cnn}\ndata: {path: x}\noutput: y\nepoch: 3\n")
    assert run() == 2
    assert "there is no key 'epoch': did you mean 'epochs'?" in capsys.readouterr().err


def test_print_config_is_a_configuration(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run("--seed", "7", "--print_config")
    assert exit_.value.code == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert main(["train", str(tmp_path / "again.yaml"), "--epochs", "1"]) == 0
    assert "seed: 7" in (tmp_path / "out" / "config.yaml").read_text()


def test_commands(capsys):
    assert main(["trian"]) == 2
    assert main([]) == 0
    assert main(["--version"]) == 0
    assert f"hvdlocal {hvdlocal.__version__}" in capsys.readouterr().out
    assert main(["train"]) == 2
