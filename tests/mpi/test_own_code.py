"""Tasks, models, optimizers, schedules and transforms by import path, on all ranks."""

import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.configs import digits_config
from support.records import records

from hvdlocal.communicator import DisagreementError, SetupError
from hvdlocal.training import Trainer
from hvdlocal.training.config import (
    CheckpointConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    PeriodConfig,
    ScheduleConfig,
)
from hvdlocal.training.tasks.checked import is_record_field

CODE = "support.own_code"
SLOPE = ModelConfig("support.models:Slope", arguments={"numel": 3})
LOCAL = MethodConfig("local", PeriodConfig(period=2))


def config(place, output, task, **settings):
    settings = {
        "model": SLOPE,
        "method": LOCAL,
        "optimizer": OptimizerConfig(lr=0.25, momentum=0.0),
        "schedule": ScheduleConfig("constant"),
        "epochs": 1.0,
        "evaluate_every_epochs": 0.5,
        "overwrite": True,
        "data_batch_size": 8,
        **settings,
    }
    return digits_config(place / "data", place / output, task=f"{CODE}:{task}", **settings)


def weights(place, output, name="model.pt"):
    return torch.load(place / output / name, weights_only=True)["w"].tolist()


def run(comm, settings):
    trainer = Trainer(settings, comm)
    summary = trainer.run()
    comm.barrier("test.saved")
    return summary


def steps(comm):
    """Steps of a rank in one epoch of 96 images, in batches of 8 per rank; whole rounds of 2 steps."""
    return -(-96 // (8 * comm.size))


def test_a_task_of_ones_own(comm, place):
    summary = run(comm, config(place, "own", "Downhill", task_arguments={"slope": 2.0}))
    final = 5 - summary.steps * 0.25 * 2.0
    assert summary.steps >= steps(comm)
    assert weights(place, "own") == [pytest.approx(final)] * 3
    assert summary.evaluation.weight == pytest.approx(final), "a mean over all test images of all ranks"
    assert summary.evaluation.samples == 31
    assert summary.evaluation.loss == pytest.approx(2.0 * 3 * final)
    if comm.rank == 0:
        assert {"weight", "loss", "samples"} <= records(place / "own", "evaluation")[0].keys()
        assert "weight" in records(place / "own", "steps")[0]
        assert "accuracy" not in (place / "own/metrics.jsonl").read_text()


@pytest.mark.parametrize(("task", "which"), [("Downhill", min), ("Uphill", max)])
def test_the_best_model_is_that_of_the_tasks_metric(comm, place, task, which):
    run(comm, config(place, f"best-{task}", task, epochs=4.0))
    if comm.rank == 0:
        seen = [record["weight"] for record in records(place / f"best-{task}", "evaluation")]
        assert len(seen) > 2
        assert weights(place, f"best-{task}", "best.pt")[0] == pytest.approx(which(seen))


def test_an_optimizer_and_a_schedule_of_ones_own(comm, place):
    """Torch's SGD by import path, with a schedule that halves the rate: w falls by the sum of the rates."""
    settings = config(
        place,
        "parts",
        "Downhill",
        optimizer=OptimizerConfig("torch.optim:SGD", lr=0.25, arguments={"momentum": 0.0}),
        schedule=ScheduleConfig(f"{CODE}:halves", arguments={"factor": 0.1}),
        method=MethodConfig("sync"),
    )
    trainer = Trainer(settings, comm)
    assert type(trainer.optimizer.optimizer) is torch.optim.SGD
    rates = [trainer.session.length.schedule(step) for step in range(steps(comm))]
    summary = trainer.run()
    comm.barrier("test.saved")
    assert summary.steps == steps(comm)
    assert set(rates) == {0.25, 0.025}
    assert weights(place, "parts") == [pytest.approx(5 - sum(rates))] * 3


def test_groups_keep_the_proportions_of_their_rates(comm, place):
    settings = config(
        place,
        "groups",
        "Downhill",
        model=ModelConfig(f"{CODE}:TwoSlopes"),
        optimizer=OptimizerConfig(f"{CODE}:slow_half", lr=0.25),
    )
    summary = run(comm, settings)
    assert weights(place, "groups") == [pytest.approx(5 - 0.25 * summary.steps)]
    assert torch.load(place / "groups/model.pt", weights_only=True)["v"].item() == pytest.approx(
        5 - 0.125 * summary.steps
    )


def test_tensors_of_one_element_and_numbers_of_numpy(comm, place):
    summary = run(comm, config(place, "one", "OneElement"))
    assert summary.evaluation.weight == pytest.approx(5 - summary.steps * 0.25)
    assert summary.evaluation.half == 0.5


def test_no_field_of_the_records_may_be_a_metric(comm, place):
    run(comm, config(place, "fields", "Downhill"))
    if comm.rank == 0:
        found = {
            name for record in records(place / "fields") if record["kind"] in ("steps", "evaluation") for name in record
        }
        assert {name for name in found - {"weight", "loss"} if not is_record_field(name)} == set()


def test_a_model_and_a_transform_of_ones_own(comm, place):
    """The model gets the number of classes; the transform changes what training sees, after the normalisation."""
    settings = digits_config(
        place / "data",
        place / "model",
        model=ModelConfig(f"{CODE}:network", arguments={"width": 5}),
        epochs=1.0,
        overwrite=True,
        data_batch_size=8,
    )
    trainer = Trainer(settings, comm)
    assert trainer.session.model[3].weight.shape == (3, 5)
    assert 0 <= trainer.run().evaluation.accuracy <= 1
    shifted = config(
        place, "shifted", "MeanPixel", data_transform=f"{CODE}:Shift", data_transform_arguments={"by": 7.0}
    )
    plain = config(place, "plain", "MeanPixel")
    means = []
    for one in (plain, shifted):
        trainer = Trainer(one, comm)
        means.append(float(next(iter(trainer.session.loader))[0].mean()))
        trainer.run()
    assert means[1] == pytest.approx(means[0] + 7.0, rel=1e-5)


def test_the_trial_changes_nothing(comm, place):
    """Before training, a copy takes a step; the model, random numbers and the data begin as without that."""
    settings = config(place, "trial", "Draws")
    np.random.seed(3)
    random.seed(3)
    expected = np.random.random(), random.random()
    np.random.seed(3)
    random.seed(3)
    trainer = Trainer(settings, comm)
    assert (np.random.random(), random.random()) == expected
    assert trainer.session.model.w.tolist() == [5.0] * 3
    assert trainer.session.loader.samples_consumed == 0
    trainer.run()


MISTAKES = [
    ({"task": "Nowhere"}, "the module support.own_code has no 'Nowhere'"),
    (
        {"task": "Downhill", "task_arguments": {"slop": 1}},
        "unexpected keyword argument 'slop'; its arguments are Downhill",
    ),
    ({"task": "network"}, "missing a required argument: 'num_classes'"),
    (
        {"task": "network", "task_arguments": {"num_classes": 2}},
        "it is Sequential; a task is a subclass of hvdlocal.Task",
    ),
    (
        {"task": "Downhill", "model": ModelConfig(f"{CODE}:no_model")},
        "it returned str, but a model is a torch.nn.Module",
    ),
    ({"task": "Downhill", "model": ModelConfig("resnet9")}, "Downhill has no model of this name; name your own as"),
    ({"task": "LossAlone"}, "must return (loss, output), not a tensor () of float32"),
    ({"task": "LossPerSample"}, "the loss must be a scalar tensor with a gradient, not a tensor (2,) of float32"),
    ({"task": "Detached"}, "the loss must be a scalar tensor with a gradient, but it has no gradient"),
    ({"task": "MeanInsteadOfSum"}, "weight must be (sum, count), two numbers, not a tensor ()"),
    ({"task": "NamedLikeAField"}, "a metric cannot be called 'lr'"),
    ({"task": "ReturnsTheLoss"}, "metrics() must not return the loss"),
    ({"task": "BestIsAWord"}, 'best=\'weight\' must be the name of a metric and "min" or "max"'),
    ({"task": "WithoutLoss"}, "WithoutLoss has no loss(): implement it"),
    ({"task": "BuildsNothing"}, "it returned NoneType, but a model is a torch.nn.Module"),
    ({"task": "Downhill", "model": ModelConfig("torch.nn:Identity")}, "it has no parameters that can be trained"),
    (
        {"task": "Downhill", "model": ModelConfig("torch.nn:LazyLinear", arguments={"out_features": 2})},
        "has no size yet",
    ),
    (
        {"task": "Downhill", "optimizer": OptimizerConfig("torch.optim:Adam", arguments={"lr": 3})},
        "optimizer.arguments.lr=3: the learning rate is optimizer.lr",
    ),
    ({"task": "NoSuchBest"}, "best=('accuracy', 'max') must be one of the metrics loss, weight"),
    ({"task": "FailsInEvaluation"}, "KeyError: 'weight' (in "),
    (
        {"task": "Downhill", "optimizer": OptimizerConfig("torch.optim:LBFGS")},
        "optimizer.name=torch.optim:LBFGS: TypeError",
    ),
    (
        {"task": "Downhill", "optimizer": OptimizerConfig(f"{CODE}:no_model")},
        "takes 0 positional arguments|too many positional",
    ),
    ({"task": "Downhill", "schedule": ScheduleConfig(f"{CODE}:no_model")}, "too many positional arguments"),
    ({"task": "Downhill", "data_transform": f"{CODE}:no_model"}, "this is a str; name a function or a class"),
    (
        {"task": "Downhill", "data_flip": True, "data_transform": "Shift"},
        "name your own transform as package.module:Class",
    ),
]


@pytest.mark.parametrize(("settings", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence_on_all_ranks(comm, place, settings, sentence):
    with pytest.raises(ValueError, match=r"=") as caught:
        Trainer(config(place, "mistake", **settings), comm)
    assert any(part in str(caught.value) for part in sentence.split("|")), str(caught.value)
    assert "\n" not in str(caught.value)
    comm.barrier("test.mistake")


def test_a_mistake_on_one_rank(comm, place):
    if comm.size == 1:
        return
    with pytest.raises(SetupError, match=rf"RuntimeError: only here \(in .*own_code.py.*\(rank 1 of {comm.size}\)"):
        Trainer(config(place, "one-rank", "FailsOnRankOne"), comm)


def test_code_that_changed_since_the_checkpoint_is_named(comm, place, monkeypatch, capsys):
    """The run continues, as it does with other versions of what it uses, and says so."""
    module = place / "code_of_run.py"

    def write(text):
        if comm.rank == 0:
            module.write_text(f"from support.models import Slope\n{text}\n")
        comm.barrier("test.written")

    write("first = 1")
    monkeypatch.syspath_prepend(str(place))
    checkpoints = CheckpointConfig(every_steps=2)
    settings = config(
        place, "edited", "Downhill", model=ModelConfig("code_of_run:Slope"), checkpoint=checkpoints, epochs=3.0
    )
    trainer = Trainer(settings, comm)
    after_step = trainer.coordinator.after_step

    def stop_after(steps):
        after_step(steps)
        if steps == 5:
            raise KeyboardInterrupt

    trainer.coordinator.after_step = stop_after
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
        comm.barrier("test.stopped")
        write("second = 2")
        Trainer(replace(settings, overwrite=False), comm).run()
    finally:
        sys.modules.pop("code_of_run", None)
    said = capsys.readouterr().out
    assert ("note: your own code has changed since the checkpoint: code_of_run" in said) is (comm.rank == 0)


def test_other_code_on_another_rank(comm, place, tmp_path, monkeypatch):
    """The code is part of what all ranks must share: a node with an old copy of a file is refused."""
    mine = tmp_path / f"rank{comm.rank}"  # tmp_path is each rank's own
    mine.mkdir()
    (mine / "model_of_rank.py").write_text(f"from support.models import Slope\nrank = {min(comm.rank, 1)}\n")
    monkeypatch.chdir(mine)
    monkeypatch.setattr(sys, "path", [*sys.path])
    settings = config(place, "differs", "Downhill", model=ModelConfig("model_of_rank:Slope"))
    try:
        if comm.size == 1:
            Trainer(settings, comm).run()
        else:
            with pytest.raises(DisagreementError, match=r"code of model_of_rank: rank 1 has .*, rank 0 has "):
                Trainer(settings, comm)
    finally:
        sys.modules.pop("model_of_rank", None)
