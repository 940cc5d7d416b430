"""The trainer with islands: every local preset with every rule for H, killed and continued, on the same ranks and on others."""

import copy
import json
import os
import random
import re
from dataclasses import replace

import pytest
import torch
from support.configs import digits_config
from support.islands import with_islands
from support.killed import train
from support.models import everywhere_equal, flat
from support.records import records

from hvdlocal.communicator import SetupError
from hvdlocal.communicator.islands import form_islands
from hvdlocal.training import Trainer
from hvdlocal.training.checkpoint import files
from hvdlocal.training.checkpoint.resume import averaged_model
from hvdlocal.training.config import CheckpointConfig, MethodConfig, OptimizerConfig, PeriodConfig

SAMPLES, BATCH = 96, 4

QSR, POWER = PeriodConfig("qsr", alpha=0.1, h_base=2), PeriodConfig("power", alpha=0.1, h_base=2, exponent=1.0)
POST_LOCAL = PeriodConfig("post-local", period=3, switch_epochs=0.5)
METHODS = {
    "local, constant": MethodConfig("local", PeriodConfig(period=3)),
    "local, adacomm": MethodConfig("local", PeriodConfig("adacomm", period=4)),
    "local-lin, qsr": MethodConfig("local-lin", QSR),
    "local-lin, post-local": MethodConfig("local-lin", POST_LOCAL, momentum="reset"),
    "local-ada, qsr": MethodConfig("local-ada", QSR, statistics="exact"),
    "local-ada, power": MethodConfig("local-ada", POWER),
    "local-ada-nostale, post-local": MethodConfig("local-ada-nostale", POST_LOCAL),
    "accumulated": MethodConfig("local-ada", PeriodConfig(period=3), accumulate=2, momentum="average"),
    "averaged inside": MethodConfig("local", PeriodConfig(period=5), island_period=2),
    "averaged inside, linear": MethodConfig("local-lin", PeriodConfig(period=4), island_period=3),
}


@pytest.fixture
def islands(comm):
    """Islands of two ranks, else of all."""
    if comm.size == 1:
        pytest.skip("one rank is no island")
    return with_islands(comm, 2 if comm.size % 2 == 0 else comm.size)


def config(place, request, method, islands, every_steps=None, **settings):
    name = re.sub(r"\W+", "-", request.node.name)
    return digits_config(
        place / "data",
        place / name,
        method=replace(method, island=islands.island_size) if method.is_local else method,
        data_batch_size=BATCH,
        optimizer=OptimizerConfig(lr=0.02),
        log_every_seconds=0,
        device="cpu",
        checkpoint=CheckpointConfig(every_steps=every_steps, keep=3),
        **{"epochs": 1.0, **settings},
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method(comm, place, request, islands, name):
    """An island's replicas are equal at every step; progress is the sum of what the steps count for."""
    method = METHODS[name]
    trainer = Trainer(config(place, request, method, islands), islands)
    equal = []

    def compare(optimizer, *_):
        mine = flat(optimizer.model).clone()
        equal.append(everywhere_equal(islands.island or comm, mine) if islands.island else True)

    trainer.optimizer.register_step_post_hook(compare)
    trainer.run()
    comm.barrier("test.trained")
    if method.island_period == 1:
        assert all(equal)
    elif islands.island:
        assert not all(equal), "each rank steps by itself between two averages inside"
    steps, [end] = records(trainer.output.path, "steps"), records(trainer.output.path, "end")
    assert all(0 < record["loss"] < 20 for record in steps)
    k, n, a = islands.num_islands, islands.island_size, method.accumulate
    assert (end["ranks"], end["island_size"], end["num_workers"]) == (comm.size, n, k)
    counted = {"local": lambda gain: 1.0, "local-lin": lambda gain: float(k * n * a)}.get(
        method.preset, lambda gain: gain
    )
    progress = 0.0
    for record in steps[: end["steps"]]:
        progress += counted(record["gain"])
        assert record["progress"] == pytest.approx(progress)
        assert 0 < record["gain"] <= k * n * a + 1e-9
    epoch = SAMPLES / BATCH / (comm.size * a if method.preset == "local" else 1)
    assert progress >= epoch * (1 - 1e-9) > progress - counted(steps[-1]["gain"])
    assert end["scale_invariant_epochs"] == pytest.approx(progress / epoch)
    assert end["data_epochs"] == pytest.approx(end["steps"] * a * comm.size * BATCH / SAMPLES)
    assert everywhere_equal(comm, flat(trainer.session.model))
    if comm.size > 1:
        assert (end["island_bytes_sent"] > 0) is (n > 1)
        statistics_at_once = method.preset == "local-ada-nostale"  # which are summed over all ranks
        assert (end["bytes_sent"] > 0) is (k > 1 or statistics_at_once)


KILLED = ["local, adacomm", "local-lin, qsr", "local-ada, qsr", "local-ada-nostale, post-local", "accumulated"]
KILLED = KILLED if os.environ.get("HVDLOCAL_BACKEND") == "mpi4py" else KILLED[-1:]
"""What a checkpoint holds does not depend on the engine."""


@pytest.mark.parametrize("name", [*KILLED, "averaged inside"])
def test_a_run_killed_anywhere_comes_to_the_same_end(place, request, islands, monkeypatch, name):
    settings = config(place, request, METHODS[name], islands, epochs=3.0)
    whole = train(islands, settings, monkeypatch)
    choose = random.Random(name)
    every, steps = choose.randint(1, 4), whole.state.position.steps
    settings = replace(settings, output=f"{settings.output}-killed", checkpoint=CheckpointConfig(every_steps=every))
    for death in sorted(choose.sample(range(1, steps), 2)):
        train(islands, settings, monkeypatch, death)
    final = train(islands, settings, monkeypatch)
    assert final.resumed is None or final.resumed.state is not None
    assert torch.equal(flat(final.session.model), flat(whole.session.model))
    for kind in ("steps", "round"):
        one, other = (
            [(r["step"], r["progress"], r["loss"], r["gain"], r["data_epoch"]) for r in records(run.output.path, kind)]
            for run in (whole, final)
        )
        assert one == other


def test_other_islands_go_on_with_the_average(comm, place, request, monkeypatch):
    """Of as many ranks, in the middle of a round; also from none and to none."""
    sizes = [size for size in (1, 2, 4, comm.size) if comm.size % size == 0]
    method = MethodConfig("local-ada", period=PeriodConfig(period=50))
    for before, now in zip(sizes, [*sizes[1:], sizes[0]], strict=True):
        if before == now:
            continue
        old, new = with_islands(comm, before), with_islands(comm, now)
        settings = config(place, request, method, old, every_steps=4, epochs=8.0)
        settings.output += f"-{before}-{now}"
        root = train(old, settings, monkeypatch, 10).output.path / "checkpoints"
        path = files.directory(root, files.newest_first(root)[0])
        assert files.read_manifest(path)["in_sync"] is False
        settings.method = replace(method, island=now)
        mean = averaged_model(path)
        trainer = Trainer(settings, new)
        assert trainer.resumed.state is None
        assert trainer.optimizer.in_sync
        ranks = f"{comm.size} rank{'s' * (comm.size > 1)}" + (f" in islands of {before}" if before > 1 else "")
        assert f"averaged over the {ranks} that wrote it" in next(trainer.resumed.describe({}))
        model = trainer.session.model.state_dict()
        for key, value in mean.items():
            torch.testing.assert_close(model[key], value)
        assert everywhere_equal(comm, flat(trainer.session.model))
        trainer.run()
        comm.barrier("test.trained")
        assert records(trainer.output.path, "end")[0]["island_size"] == now


def test_islands_of_other_ranks_go_on_with_the_average(comm, place, request, monkeypatch):
    """As after `--map-by node`: each of the new islands would hold replicas of two old ones."""
    if comm.size % 4:
        pytest.skip("needs four ranks")
    half = comm.size // 2
    old, new = with_islands(comm, half), copy.copy(comm)
    for module in ("communicator.islands", "training.joining"):
        monkeypatch.setattr(f"hvdlocal.{module}.node_name", lambda: f"node {comm.rank % 2}")
    form_islands(new, half)
    settings = config(place, request, MethodConfig("local", PeriodConfig(period=50)), old, every_steps=4, epochs=8.0)
    train(old, settings, monkeypatch, 10)
    trainer = train(new, settings, monkeypatch)
    assert trainer.resumed.state is None
    assert everywhere_equal(comm, flat(trainer.session.model))


def test_a_checkpoint_from_before_there_were_islands(comm, place, request, monkeypatch):
    method = MethodConfig("local", period=PeriodConfig(period=50))
    settings = config(place, request, method, comm, every_steps=4, epochs=8.0)
    root = train(comm, settings, monkeypatch, 10).output.path / "checkpoints"
    if comm.rank == 0:
        for step in files.newest_first(root):
            path = files.directory(root, step) / files.MANIFEST
            manifest = json.loads(path.read_text())
            del (
                manifest["islands"],
                manifest["settings"]["method.island"],
                manifest["settings"]["method.island_period"],
            )
            manifest["sha256"] = files._checksum(manifest)
            path.write_text(json.dumps(manifest))
    comm.barrier("test.old")
    assert train(comm, settings, monkeypatch).resumed.state is not None


def test_a_communicator_with_other_islands_is_refused(comm, place, request, islands):
    method = MethodConfig("local")
    other = 1 if islands.island_size > 1 else 2
    settings = config(place, request, method, islands)
    settings.method.island = other
    with pytest.raises(SetupError, match=rf"method.island={other} needs islands of {other}|does not divide"):
        Trainer(settings, islands)
