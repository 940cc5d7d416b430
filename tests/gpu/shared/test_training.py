"""The trainer on the device: methods learn, evaluations are exact, the loop does not wait, a killed run continues bit for bit."""

from contextlib import ExitStack

import pytest
import torch
from support.configs import digits_config
from support.datasets import TEST_IMAGES
from support.killed import train
from support.records import records
from test_averaging import equal_everywhere
from waiting import no_waits

import hvdlocal
from hvdlocal.models import build_model
from hvdlocal.training import Trainer
from hvdlocal.training.checkpoint import files
from hvdlocal.training.config import (
    CheckpointConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    PeriodConfig,
)
from hvdlocal.training.step import TrainingStep

PRESETS = ["sync", "local", "acc-lin", "acc-ada", "local-lin", "local-ada", "local-ada-nostale", "diloco", "slowmo"]


def configuration(place, output, device, method, **settings):
    settings = {"epochs": 6.0, "optimizer": OptimizerConfig(lr=0.02), **settings}
    return digits_config(
        place / "data",
        place / output,
        data_batch_size=8,
        data_flip=True,
        data_crop_padding=1,
        data_storage="ram",
        data_threads=1,
        model=ModelConfig("digits_cnn", channels_last=True),
        method=method,
        evaluate_every_epochs=3.0,
        log_every_seconds=1e6,
        device=device.type,
        **settings,
    )


def run(comm, config):
    trainer = Trainer(config, comm)
    summary = trainer.run()
    comm.barrier("test.trained")
    return trainer, summary


HALF = [(preset, precision) for preset in ("sync", "local-ada") for precision in ("bfloat16", "float16")]


@pytest.mark.parametrize(("preset", "precision"), [*((preset, "float32") for preset in PRESETS), *HALF])
def test_every_preset_learns(comm, place, device, preset, precision):
    method = MethodConfig(preset, period=PeriodConfig(period=2))
    trainer, summary = run(comm, configuration(place, f"{preset}-{precision}", device, method, precision=precision))
    assert all(p.device == device for p in trainer.session.model.parameters())
    assert summary.evaluation.samples == TEST_IMAGES, "every test image once"
    assert summary.evaluation.accuracy == 1.0
    assert equal_everywhere(comm, torch.cat([p.detach().reshape(-1) for p in trainer.session.model.parameters()]))
    saved = torch.load(trainer.output.path / "model.pt", weights_only=True)
    assert all(tensor.device.type == "cpu" for tensor in saved.values())


@pytest.mark.parametrize("buffers", ["average", "reestimate"])
def test_an_evaluation_is_that_of_the_saved_model_on_the_cpu(comm, place, device, monkeypatch, buffers):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # whose products have three decimals
    method = MethodConfig("local-ada", period=PeriodConfig(period=3), buffers=buffers)
    config = configuration(place, f"evaluated-{buffers}", device, method, epochs=0.5)
    trainer, summary = run(comm, config)
    model = build_model("digits_cnn", 3, (8, 8, 1)).eval()
    model.load_state_dict(torch.load(trainer.output.path / "model.pt", weights_only=True))
    data = hvdlocal.ShardedDataset(config.data.path, "test")
    x, y = next(
        hvdlocal.data.evaluation_batches(data, TEST_IMAGES, transform=trainer.session.preprocessing.test_transform)
    )
    with torch.no_grad():
        logits = model(x)
    assert summary.evaluation.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, y)), rel=1e-3)
    assert summary.evaluation.accuracy == pytest.approx(float((logits.argmax(1) == y).double().mean()), abs=1.01 / 31)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_loop_does_not_wait_inside_a_round(comm, place, device, monkeypatch, preset):
    """Loader, augmentation, forward and backward pass, step, and on a GPU also records and checkpoints that are not due."""
    from test_waiting import averages_now

    method = MethodConfig(preset, period=PeriodConfig(period=4), accumulate=1 if preset.startswith("acc") else 2)
    config = configuration(place, f"waiting-{preset}", device, method, precision="bfloat16")
    trainer = Trainer(config, comm)
    free = 0
    original_compute, original_update = TrainingStep.compute, TrainingStep.update
    with ExitStack() as watch:

        def compute(self, batch):
            """Watches this micro-batch and all that the loop does until the next one."""
            nonlocal free
            watch.close()
            optimizer = trainer.optimizer
            if optimizer.round and not averages_now(optimizer):  # the first round starts the device's libraries
                watch.enter_context(no_waits(device))
                free += 1
            return original_compute(self, batch)

        def update(self):
            original_update(self)
            if device.type == "cpu":  # where the poll's own numbers cannot be told from the device's
                watch.close()

        monkeypatch.setattr(TrainingStep, "compute", compute)
        monkeypatch.setattr(TrainingStep, "update", update)
        trainer.run()
    comm.barrier("test.waited")
    assert free >= 4


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("preset", ["local-ada", "acc-ada"])
def test_a_run_killed_inside_a_round_comes_to_the_same_bits(comm, place, device, monkeypatch, preset):
    """With AdamW's moments, bfloat16, and a network whose steps depend on the device's random state."""

    def build(name, num_classes, shape, arguments):
        return torch.nn.Sequential(torch.nn.Dropout(0.1), build_model(name, num_classes, shape))

    monkeypatch.setattr("hvdlocal.training.tasks.image_classification.build_model", build)
    method = MethodConfig(preset, period=PeriodConfig(period=3))
    settings = {"optimizer": OptimizerConfig("adamw", lr=0.01), "precision": "bfloat16"}

    def config(output, every=None):
        made = configuration(place, f"{preset}-{output}", device, method, **settings)
        made.checkpoint = CheckpointConfig(every_steps=every, keep=3)
        return made

    whole, _ = run(comm, config("whole"))
    killed = train(comm, config("killed", 2), monkeypatch, die_after=5)
    assert not (killed.output.path / "model.pt").exists()
    step = files.newest_first(killed.output.path / "checkpoints")[0]
    assert files.read_manifest(files.directory(killed.output.path / "checkpoints", step))["in_sync"] is (
        preset == "acc-ada"
    )
    final, _ = run(comm, config("killed", 2))
    assert final.resumed is not None
    assert final.resumed.step == step
    for name in ("model.pt", "best.pt"):
        a, b = (torch.load(trainer.output.path / name, weights_only=True) for trainer in (whole, final))
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert losses(final.output.path) == losses(whole.output.path)


def losses(directory):
    return [(record["kind"], record["step"], record.get("loss")) for record in records(directory)]
