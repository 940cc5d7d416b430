"""The Python examples of the documents run, by one rank."""

from functools import partial

import h5py
import numpy as np
import pytest
import torch
from pages import blocks
from support.configs import digits_config
from support.mortal import Death, run_mortal

import hvdlocal
from hvdlocal.communicator import SingleProcess
from hvdlocal.training import Trainer


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr("hvdlocal.communicator.launch._current", SingleProcess())


@pytest.fixture
def script():
    """The names that a training script has before hvdlocal comes to it."""
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(6)]
    return {"torch": torch, "model": torch.nn.Linear(3, 2), "loader": batches, "loss": torch.nn.functional.mse_loss}


def test_in_your_script(script):
    before = script["model"].weight.clone()
    (example,) = blocks("README.md", "python")
    exec(example.text, script)
    assert script["optimizer"].round == 2
    assert script["optimizer"].in_sync
    assert not torch.equal(script["model"].weight, before)


def test_saving_and_resuming_inside_a_round(script, tmp_path, data):
    """What was saved is what is loaded, and further steps give the same bits."""
    dataset = hvdlocal.ShardedDataset(data, "train")
    script |= {"comm": hvdlocal.init(), "loader": hvdlocal.Loader(dataset, 8), "model": torch.nn.Linear(128, 5)}
    script["optimizer"] = hvdlocal.LocalOptimizer(
        torch.optim.SGD(script["model"].parameters(), lr=0.1, momentum=0.9),
        script["model"],
        period=hvdlocal.ConstantPeriod(4),
        scaling=hvdlocal.LocalAdaScale(),
    )
    (example,) = blocks("docs/horovod.md", "python")
    exec(example.text, script)

    def train(steps: int) -> torch.Tensor:
        batches = iter(script["loader"])
        for _ in range(steps):
            x, y = next(batches)
            script["optimizer"].zero_grad()
            torch.nn.functional.cross_entropy(script["model"](x.flatten(1).float()), y.long()).backward()
            script["optimizer"].step()
        return script["model"].weight.detach().clone()

    train(6)
    assert script["optimizer"].steps_in_round == 2
    script["save"](f"{tmp_path}/state")
    further = train(3)
    script["resume"](f"{tmp_path}/state")
    assert script["optimizer"].steps_in_round == 2
    assert torch.equal(train(3), further)


def test_checkpoints_in_a_loop(script, tmp_path, data, monkeypatch):
    """A second start has nothing to do."""
    monkeypatch.chdir(tmp_path)

    def flat(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.flatten(1).float() / 255, torch.nn.functional.one_hot(y, 2).float()

    class Flat(hvdlocal.Loader):
        def __iter__(self):
            return (flat(x, y % 2) for x, y in super().__iter__())

    script |= {"hvdlocal": hvdlocal, "model": torch.nn.Linear(128, 2)}
    script["loader"] = Flat(hvdlocal.ShardedDataset(data, "train"), 8)
    inner = torch.optim.SGD(script["model"].parameters(), lr=0.1)
    script["optimizer"] = hvdlocal.LocalOptimizer(inner, script["model"], period=hvdlocal.ConstantPeriod(4))
    script["schedule"] = torch.optim.lr_scheduler.StepLR(script["optimizer"], 10)
    example, _ = blocks("docs/checkpoints.md", "python")
    exec(example.text, script)
    assert script["checkpoints"].steps == 75
    with pytest.raises(hvdlocal.AlreadyFinished):
        exec(example.text, script)


def test_a_loop_that_goes_on_without_ranks_that_die():
    _, example = blocks("docs/checkpoints.md", "python")

    def body(comm):
        model = torch.nn.Linear(3, 2)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        script = {"hvdlocal": Loop(comm), "comm": comm, "model": model, "inner": inner}
        script["x"] = script["y"] = torch.arange(12)
        exec(example.text, script)
        before = script["x_mine"].tolist()
        for _ in range(16):
            script["optimizer"].step()
        return before, script["x_mine"].tolist(), script["y_mine"].tolist()

    class Loop:
        """The package, whose communicator is that of a thread."""

        ConstantPeriod = hvdlocal.ConstantPeriod

        def __init__(self, comm):
            self.LocalOptimizer = partial(hvdlocal.LocalOptimizer, communicator=comm)

    first, lost, last = run_mortal(3, body, Death(1, "hvdlocal.average"))
    assert lost is None
    assert first == ([0, 3, 6, 9], [0, 2, 4, 6, 8, 10], [0, 2, 4, 6, 8, 10])
    assert last == ([2, 5, 8, 11], [1, 3, 5, 7, 9, 11], [1, 3, 5, 7, 9, 11])


@pytest.fixture
def data(tmp_path):
    for split, count in (("train", 300), ("test", 40)):
        images = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 2), dtype=np.uint8)
        writer = hvdlocal.ShardWriter(tmp_path / "data" / "cifar10", split, classes=list("abcde"))
        writer.write(images, np.arange(count) % 5)
    return tmp_path / "data" / "cifar10"


def test_a_loop_with_our_data(data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {"model": lambda images: torch.nn.functional.one_hot(torch.zeros(len(images), dtype=torch.long), 5)}
    with h5py.File("mine.h5", "w") as file:
        file["density"], file["mask"] = np.ones((100, 4, 4), np.float32), np.ones((100, 4, 4), bool)
        file["energy"] = np.arange(100.0)
    for example in blocks("docs/data.md", "python"):
        exec(example.text, names)
    assert names["loader"].samples_consumed >= 300
    assert names["images"].shape == (128, 2, 8, 8)
    assert names["accuracy"] == pytest.approx(0.2)
    assert (names["density"].shape, names["energy"].dtype) == ((64, 4, 4), torch.float64)


def test_a_callback_and_its_records(data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    callback, records = blocks("docs/callbacks.md", "python")
    exec(callback.text, names)
    config = digits_config(data, "runs/digits", data_batch_size=32, epochs=2.0)
    summary = Trainer(config, SingleProcess(), callbacks=[names["SavePlot"]()]).run()
    written = (tmp_path / "runs" / "digits" / "accuracies.txt").read_text()
    assert written.startswith(f"{summary.steps}: [")
    assert written.count(",") == 1  # two evaluations
    monkeypatch.setattr("pandas.DataFrame.plot", lambda table, x, y: table[[x, *y]])
    exec(records.text, names)
    assert len(names["rounds"]) == summary.rounds
