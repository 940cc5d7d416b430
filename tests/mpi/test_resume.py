"""A training run that ends anywhere and is started again comes to the same bits: model, records, summary."""

import os
import random
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from support.configs import digits_config
from support.killed import outcome, same, train
from support.models import everywhere_equal

import hvdlocal
from hvdlocal.communicator import SetupError
from hvdlocal.models import build_model
from hvdlocal.training import AlreadyFinished, Interrupted, Trainer, interruption
from hvdlocal.training.checkpoint import files
from hvdlocal.training.checkpoint.coordinator import CheckpointCoordinator
from hvdlocal.training.checkpoint.files import CheckpointError
from hvdlocal.training.checkpoint.writer import CheckpointWriter
from hvdlocal.training.config import (
    CheckpointConfig,
    MethodConfig,
    OptimizerConfig,
    PeriodConfig,
    ScheduleConfig,
)
from hvdlocal.training.output_directory import LockedDirectory

qsr = PeriodConfig(rule="qsr", alpha=0.1, h_base=2)
long = PeriodConfig(period=9)
KINDS = {
    "sync": {"method": MethodConfig("sync"), "optimizer": OptimizerConfig(lr=0.05, nesterov=True)},
    "local": {"method": MethodConfig("local", period=long, buffers="local")},
    "local-accumulated": {
        "method": MethodConfig("local", period=PeriodConfig(period=3), accumulate=2, momentum="reset")
    },
    "acc-lin": {"method": MethodConfig("acc-lin", period=PeriodConfig(period=3))},
    "acc-ada": {"method": MethodConfig("acc-ada", period=PeriodConfig(period=2)), "epochs": 2.0},
    "local-lin": {"method": MethodConfig("local-lin", period=PeriodConfig(period=4)), "epochs": 4.0},
    "local-ada": {"method": MethodConfig("local-ada", period=long, momentum="average"), "epochs": 2.0},
    "local-ada-exact": {"method": MethodConfig("local-ada", period=qsr, statistics="exact"), "epochs": 2.0},
    "local-ada-nostale": {
        "method": MethodConfig("local-ada-nostale", period=long, buffers="reestimate"),
        "epochs": 2.0,
    },
    "adamw-post-local": {
        "method": MethodConfig("local", period=PeriodConfig(rule="post-local", period=6, switch_epochs=1.5)),
        "optimizer": OptimizerConfig("adamw", lr=0.01),
    },
    "adacomm": {"method": MethodConfig("local", period=PeriodConfig(rule="adacomm", period=7))},
}


@pytest.fixture(autouse=True)
def _dropout(monkeypatch):
    """A network whose steps depend on the random state."""

    def build(name, num_classes, shape, arguments):
        return torch.nn.Sequential(torch.nn.Dropout(0.1), build_model(name, num_classes, shape))

    monkeypatch.setattr("hvdlocal.training.tasks.image_classification.build_model", build)


def config(place, output, every_steps=None, **settings):
    settings = {
        "epochs": 3.0,
        "optimizer": OptimizerConfig(lr=0.05),
        "schedule": ScheduleConfig(warmup_epochs=0.3),
        **settings,
    }
    return digits_config(
        place / "data",
        place / output,
        data_batch_size=5,
        data_flip=True,
        data_crop_padding=1,
        data_storage="ram",
        evaluate_every_epochs=0.8,
        log_every_seconds=0,
        device="cpu",
        checkpoint=CheckpointConfig(every_steps=every_steps, keep=3),
        **settings,
    )


# What a checkpoint holds does not depend on the engine, so over Horovod a sample is enough.
@pytest.mark.parametrize("kind", KINDS if os.environ.get("HVDLOCAL_BACKEND") == "mpi4py" else ["acc-ada", "local-ada"])
def test_a_run_killed_anywhere_comes_to_the_same_end(comm, place, monkeypatch, kind):
    whole = train(comm, config(place, f"{kind}-whole", **KINDS[kind]), monkeypatch)
    steps = whole.state.position.steps
    choose = random.Random(f"{kind} {comm.size}")
    every = choose.randint(1, 6)
    settings = config(place, f"{kind}-killed", every, **KINDS[kind])
    deaths = sorted(choose.sample(range(1, steps), 2))
    for death in deaths:
        train(comm, settings, monkeypatch, death)
    final = train(comm, settings, monkeypatch)
    # A checkpoint is complete at a poll, or at the latest when the next one is due: no more than two intervals are lost.
    assert final.resumed is None or final.resumed.step > deaths[-1] - 2 * every
    assert final.resumed is not None or deaths[-1] < 2 * every
    assert same(outcome(final.output.path), outcome(whole.output.path)), (every, deaths)


def test_the_means_of_a_long_log_interval_are_carried(comm, place, monkeypatch):
    """With one line at the very end, it is the mean over all steps, those before the death included."""
    runs = [config(place, "long-log-whole", **KINDS["local"]), config(place, "long-log-killed", 5, **KINDS["local"])]
    for settings in runs:
        settings.log_every_seconds = 1e6
    whole = train(comm, runs[0], monkeypatch)
    train(comm, runs[1], monkeypatch, 13)
    final = train(comm, runs[1], monkeypatch)
    assert final.resumed.step >= 5
    records = outcome(whole.output.path)[0]
    assert len([record for record in records if record["kind"] == "steps"]) == 1
    assert same(outcome(final.output.path), outcome(whole.output.path))


def test_training_does_not_wait_for_the_disk(comm, place, monkeypatch):
    """A checkpoint is finished at a poll at which all have written; until then training goes on.

    Here a rank writes only after it has taken three more steps. The last checkpoint, after which there are none, waits in vain.
    """
    from hvdlocal.training import status_exchange
    from hvdlocal.training.checkpoint import writer

    write, went_on = files.write_rank, []
    steps = threading.Semaphore(0)

    def after_three_steps(*arguments):
        while steps.acquire(blocking=False):  # those from before
            pass
        went_on.append(all(steps.acquire(timeout=5) for _ in range(3)))
        return write(*arguments)

    original = CheckpointCoordinator.after_step

    def after_step(self, step):
        original(self, step)
        steps.release()
        time.sleep(0.02)  # so that there are several exchanges of status in a run

    monkeypatch.setattr(status_exchange, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(writer.files, "write_rank", after_three_steps)
    monkeypatch.setattr(CheckpointCoordinator, "after_step", after_step)
    settings = config(place, "slow", **KINDS["local"])
    settings.checkpoint = CheckpointConfig(every_minutes=1e-6, keep=3)
    Trainer(settings, comm).run()
    assert len(went_on) > 1
    assert all(went_on[:-1])


def test_an_interruption_inside_a_round(comm, place, monkeypatch):
    kind = {**KINDS["local"], "epochs": 3.0}
    whole = train(comm, config(place, "asked-whole", **kind), monkeypatch)
    settings = config(place, "asked", **kind)
    last = comm.size - 1
    asked = interruption.SIGNALS[0] if comm.rank == last else None
    monkeypatch.setattr(interruption, "received", lambda: asked)
    with pytest.raises(Interrupted, match=f"SIGUSR2 on rank {last}"):
        Trainer(settings, comm).run()
    root = place / "asked" / "checkpoints"
    (step,) = files.newest_first(root)
    assert files.read_manifest(files.directory(root, step))["in_sync"] is False
    monkeypatch.setattr(interruption, "received", lambda: None)
    final = train(comm, settings, monkeypatch)
    assert final.resumed.step == step
    assert same(outcome(final.output.path), outcome(whole.output.path))
    with pytest.raises(AlreadyFinished, match="nothing to do"):
        Trainer(settings, comm)


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["last", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(comm, place, monkeypatch, capsys, name):
    settings = config(place, f"damaged-{name}", 4, **KINDS["local"])
    whole = train(comm, config(place, f"damaged-whole-{name}", **KINDS["local"]), monkeypatch)
    interrupted = train(comm, settings, monkeypatch, 13)
    newest, before = files.newest_first(interrupted.output.path / "checkpoints")[:2]
    if comm.rank == 0:
        file = files.rank_file(comm.size - 1) if name == "last" else name
        damage(files.directory(interrupted.output.path / "checkpoints", newest) / file)
    comm.barrier("test.damaged")
    final = Trainer(settings, comm)
    assert final.resumed.step == before
    assert "damaged" in final.resumed.skipped[0] or "cannot be read" in final.resumed.skipped[0]
    if comm.rank == 0:
        assert f"going back to step {before}" in capsys.readouterr().err
    final.run()
    comm.barrier("test.damaged_end")
    assert same(outcome(final.output.path), outcome(whole.output.path))


def test_only_damaged_checkpoints_are_refused_on_all_ranks(comm, place, monkeypatch):
    settings = config(place, "hopeless", 4, **KINDS["local"])
    root = train(comm, settings, monkeypatch, 13).output.path / "checkpoints"
    if comm.rank == 0:
        for step in files.newest_first(root):
            damage(files.directory(root, step) / files.rank_file(0))
    comm.barrier("test.hopeless")
    with pytest.raises(CheckpointError, match="none of the"):
        Trainer(settings, comm)


def test_other_settings_or_data_are_refused(comm, place, monkeypatch):
    settings = config(place, "refused", 4, **KINDS["local"])
    train(comm, settings, monkeypatch, 13)
    changed = config(place, "refused", 4, **{**KINDS["local"], "optimizer": OptimizerConfig(lr=0.5)})
    with pytest.raises(SetupError, match=r"optimizer\.lr=0\.05, not 0\.5"):
        Trainer(changed, comm)
    if comm.rank == 0:
        writer = hvdlocal.ShardWriter(place / "other", "train", classes=["a", "b", "c"])
        writer.write(np.random.default_rng(1).integers(0, 256, (96, 8, 8, 1), dtype=np.uint8), np.arange(96) % 3)
        shutil.copytree(place / "data" / "test", place / "other" / "test")
    comm.barrier("test.other")
    settings.data.path = str(place / "other")  # may change, as the same data may lie elsewhere
    with pytest.raises(CheckpointError, match="other training data"):
        Trainer(settings, comm)


def test_what_is_the_same_on_all_ranks_is_written_once(comm, place, monkeypatch):
    for kind, everything in (("sync", False), ("local", True)):
        settings = config(place, f"once-{kind}", 5, **KINDS[kind])
        root = train(comm, settings, monkeypatch, 12).output.path / "checkpoints"
        path = files.directory(root, 5)
        manifest = files.read_manifest(path)
        model = files.read_state(path, manifest, comm.rank)["model"]
        assert ("1.0.weight" in model) is (everything or comm.rank == 0)
        assert "1.1.running_mean" in model


def test_an_averaged_checkpoint_is_the_average(comm, place, monkeypatch):
    """Loaded by another number of ranks, here by one alone: closed form against the replicas themselves."""
    from hvdlocal.training.checkpoint.resume import averaged_model

    settings = config(place, "mean", 5, **KINDS["local"])
    root = train(comm, settings, monkeypatch, 12).output.path / "checkpoints"
    path = files.directory(root, 5)
    manifest = files.read_manifest(path)
    states = [files.read_state(path, manifest, rank)["model"] for rank in range(comm.size)]
    mean = averaged_model(path)
    for name, value in mean.items():
        if value.is_floating_point():
            expected = torch.stack([state[name].double() for state in states]).mean(0)
            torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=0)
    assert everywhere_equal(comm, mean["1.0.weight"])


def test_the_checkpoint_thread_ends_before_the_directory_is_closed(comm, place, monkeypatch):
    """It may still write there when a run ends with an error, and a closed descriptor soon means another directory."""
    closed = []
    for kind in (CheckpointWriter, LockedDirectory):

        def close(self, original=kind.close, name=kind.__name__):
            closed.append(name)
            original(self)

        monkeypatch.setattr(kind, "close", close)
    train(comm, config(place, "order", 1), monkeypatch, die_after=2)
    assert closed[0] == "CheckpointWriter"
    assert ("LockedDirectory" in closed) is (comm.rank == 0)
