"""The trainer with outer optimizers, overlap and moment periods: killed and continued, also inside an overlap and in islands."""

import json
import os
import random
import re
from dataclasses import replace

import pytest
import torch
from support.configs import digits_config
from support.islands import with_islands
from support.killed import outcome, same, train
from support.models import everywhere_equal, flat
from support.records import records

from hvdlocal.communicator import SetupError
from hvdlocal.training import DivergedError, Interrupted, Trainer, interruption, status_exchange
from hvdlocal.training.checkpoint import files
from hvdlocal.training.checkpoint.coordinator import CheckpointCoordinator
from hvdlocal.training.checkpoint.resume import averaged_model
from hvdlocal.training.config import CheckpointConfig, MethodConfig, OptimizerConfig, OuterConfig, PeriodConfig
from hvdlocal.training.status_exchange import StatusExchange

ADAMW = OptimizerConfig("adamw", lr=0.005)
CONSTANT, QSR = PeriodConfig(period=4), PeriodConfig("qsr", alpha=0.1, h_base=2)
ADAMW_QSR = PeriodConfig("qsr", alpha=0.01, h_base=2)  # at first 4, later longer than the overlap
POST_LOCAL = PeriodConfig("post-local", period=3, switch_epochs=0.5)
DESLOC = {"exp_avg": 2, "exp_avg_sq": 4}
METHODS = {
    "diloco": {"method": MethodConfig("diloco", CONSTANT)},
    "slowmo": {"method": MethodConfig("slowmo", POST_LOCAL, outer=OuterConfig(momentum=0.4))},
    "qsr, normalised": {"method": MethodConfig("local", QSR, outer=OuterConfig("nesterov", 0.6, 0.8, normalize=True))},
    "adaptive, outer": {"method": MethodConfig("local-ada", CONSTANT, outer=OuterConfig("slowmo", momentum=0.5))},
    "overlap 1": {"method": MethodConfig("local-ada", CONSTANT, overlap=1)},
    "overlap 3": {"method": MethodConfig("diloco", ADAMW_QSR, buffers="local", overlap=3), "optimizer": ADAMW},
    "mixing": {"method": MethodConfig("diloco", CONSTANT, momentum="reset", overlap=2, mixing=0.5)},
    "moment periods": {"method": MethodConfig("local", PeriodConfig(period=3), momentum=DESLOC), "optimizer": ADAMW},
    "all of it": {
        "method": MethodConfig(
            "slowmo",
            CONSTANT,
            accumulate=2,
            momentum={"exp_avg": 1, "exp_avg_sq": 2},
            outer=OuterConfig(momentum=0.4),
            overlap=2,
        ),
        "optimizer": ADAMW,
    },
}


def config(place, output, ranks, every_steps=None, **settings):
    # About 29 steps, and an evaluation every eighth, on any number of ranks.
    length = {"epochs": 1.5 * ranks.size, "evaluate_every_epochs": 0.4 * ranks.size}
    settings = {**length, "optimizer": OptimizerConfig(lr=0.05), **settings}
    settings["method"] = replace(settings["method"], island=ranks.island_size)
    return digits_config(
        place / "data",
        place / "outer" / f"{re.sub(r'[^a-z0-9]+', '-', output)}-{ranks.island_size}",
        data_batch_size=5,
        log_every_seconds=0,
        device="cpu",
        checkpoint=CheckpointConfig(every_steps=every_steps, keep=50),
        **settings,
    )


# What a checkpoint holds does not depend on the engine.
KILLED = METHODS if os.environ.get("HVDLOCAL_BACKEND") == "mpi4py" else ["all of it"]
IN_ISLANDS = ["diloco", "overlap 3", "all of it"]


@pytest.mark.parametrize(("name", "size"), [*((name, 1) for name in KILLED), *((name, 2) for name in IN_ISLANDS)])
def test_a_run_killed_anywhere_comes_to_the_same_end(comm, place, monkeypatch, name, size):
    """With a checkpoint at every step; one of the deaths follows a checkpoint inside a round."""
    if comm.size % size:
        pytest.skip("needs an even number of ranks")
    method, ranks = METHODS[name]["method"], with_islands(comm, size)
    whole = train(ranks, config(place, f"{name} whole", ranks, **METHODS[name]), monkeypatch)
    settings = config(place, f"{name} killed", ranks, 1, **METHODS[name])
    choose = random.Random(name)
    inside = False
    for death in sorted(choose.sample(range(2, whole.state.position.steps), 3)):
        dead = train(ranks, settings, monkeypatch, death)
        [*_, step] = sorted(files.newest_first(dead.output.path / "checkpoints"))
        manifest = files.read_manifest(files.directory(dead.output.path / "checkpoints", step))
        inside |= not manifest["in_sync"]
        assert manifest.get("shared", False) is (method.outer_optimizer != "none")
    assert inside
    final = train(ranks, settings, monkeypatch)
    assert final.resumed.state is not None
    assert same(outcome(final.output.path), outcome(whole.output.path))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_evaluated_and_saved_is_the_average(comm, place, name):
    """φ, on all ranks, whatever is under way at the end of a round."""
    trainer = Trainer(config(place, f"{name} saved", comm, **METHODS[name]), comm)
    evaluated = []
    evaluate = trainer.evaluator.__call__

    def remembering():
        found = evaluate()
        evaluated.append(flat(trainer.session.model).clone())
        assert everywhere_equal(comm, evaluated[-1])
        assert trainer.optimizer.in_sync
        return found

    trainer.evaluator = remembering
    trainer.run()
    comm.barrier("test.trained")
    phi = trainer.optimizer.shared_state().get("phi")
    assert (phi is None) is (METHODS[name]["method"].outer_optimizer == "none")
    if phi is not None:
        assert torch.equal(trainer.optimizer._flat_replica.parameters, phi)
    if comm.rank == 0:
        model = torch.load(trainer.output.path / "model.pt", weights_only=True)
        best = torch.load(trainer.output.path / "best.pt", weights_only=True)
        parameters = [name for name, _ in trainer.session.model.named_parameters()]
        values = [record["accuracy"] for record in records(trainer.output.path, "evaluation")]
        for state, at in ((model, len(values) - 1), (best, values.index(max(values)))):
            saved = torch.cat([state[name].flatten() for name in parameters])
            assert torch.equal(saved, evaluated[at])


@pytest.mark.parametrize("name", ["overlap 1", "overlap 3"])
def test_hidden_time_is_no_part_of_the_elapsed_time(comm, place, name):
    trainer = Trainer(config(place, f"{name} times", comm, **METHODS[name]), comm)
    trainer.run()
    comm.barrier("test.trained")
    if comm.rank == 0:
        steps, rounds, [end] = (records(trainer.output.path, kind) for kind in ("steps", "round", "end"))
        spent = ("computing", "averaging", "inside_islands", "waiting_for_data", "evaluating")
        assert sum(end["seconds"][name] for name in spent) == pytest.approx(end["seconds"]["elapsed"])
        assert end["seconds"]["hidden"] == pytest.approx(steps[-1]["hidden_seconds"])
        assert sum(record["round_hidden_seconds"] for record in rounds) == pytest.approx(steps[-1]["hidden_seconds"])
        assert (end["seconds"]["hidden"] > 0) is (comm.size > 1)
        assert [record["round"] for record in rounds] == list(range(1, len(rounds) + 1))
        assert rounds[0]["divergence"] is None
        assert all(record["divergence"] is not None for record in rounds[1:])


@pytest.mark.parametrize("period", [2, 3, 5])
def test_the_ranks_exchange_requests_where_no_average_is_under_way(comm, place, monkeypatch, period):
    """Or, where rounds are no longer than the overlap, at their ends: so in every round at least once."""
    monkeypatch.setattr(status_exchange, "POLL_SECONDS", 0.0)
    method = MethodConfig("local", PeriodConfig(period=period), overlap=3)
    # An evaluation would wait for the average of its round.
    trainer = Trainer(config(place, f"quiet {period}", comm, method=method, evaluate_every_epochs=99.0), comm)
    optimizer, at = trainer.optimizer, []
    exchange = StatusExchange.exchange

    def watching(self, step, *arguments):
        at.append((optimizer.round, optimizer.steps_in_round, optimizer.is_quiet))
        return exchange(self, step, *arguments)

    monkeypatch.setattr(StatusExchange, "exchange", watching)
    trainer.run()
    comm.barrier("test.trained")
    assert all(quiet for _, _, quiet in at)
    places = {place for number, place, _ in at if number}
    assert places == ({3, 4} if period == 5 else {0})
    assert {number for number, _, _ in at} >= set(range(1, optimizer.round - 1))


def test_a_request_to_stop_inside_an_overlap(comm, place, monkeypatch):
    """The checkpoint holds an average that is under way, and the run comes to the same end."""
    method = MethodConfig("diloco", PeriodConfig(period=3), overlap=3)
    settings = {"method": method, "evaluate_every_epochs": 99.0}  # an evaluation would wait for the average
    whole = train(comm, config(place, "asked whole", comm, **settings), monkeypatch)
    asked = config(place, "asked", comm, **settings)
    trainer = Trainer(asked, comm)

    def received():
        return interruption.SIGNALS[0] if comm.rank == comm.size - 1 and trainer.optimizer.round >= 2 else None

    with monkeypatch.context() as patch:
        patch.setattr(interruption, "received", received)
        patch.setattr(status_exchange, "POLL_SECONDS", 0.0)
        with pytest.raises(Interrupted):
            trainer.run()
    comm.barrier("test.interrupted")
    root = place / "outer" / "asked-1" / "checkpoints"
    [step] = files.newest_first(root)
    path = files.directory(root, step)
    state = files.read_state(path, files.read_manifest(path), comm.rank)
    assert state["optimizer"]["hvdlocal"]["pending"] is not None
    final = train(comm, asked, monkeypatch)
    assert final.resumed.step == step
    assert same(outcome(final.output.path), outcome(whole.output.path))


@pytest.mark.parametrize("death", [6, 7, 8])
@pytest.mark.parametrize("overlap", [0, 2])
def test_other_islands_go_on_with_an_outer_step_on_the_average(comm, place, monkeypatch, death, overlap):
    """M ← βm + Δ; φ ← φ − γ(Δ + βm), with Δ the way to the mean of all replicas; between two rounds, φ is that already."""
    if comm.size % 2:
        pytest.skip("needs an even number of ranks")
    method = MethodConfig("diloco", CONSTANT, outer=OuterConfig(momentum=0.9), overlap=overlap)
    for before, now in ((1, 2), (2, 1)):
        old, new = with_islands(comm, before), with_islands(comm, now)
        settings = config(place, f"other {death} {overlap} {before}", old, 1, method=method)
        root = train(old, settings, monkeypatch, death).output.path / "checkpoints"
        step = files.newest_first(root)[0]
        path = files.directory(root, step)
        manifest = files.read_manifest(path)
        parts = [files.read_state(path, manifest, rank)["shared"] for rank in range(before)]
        phi = torch.cat([part["phi"] for part in parts])
        moments = [part["optimizer"]["state"].get(0, {}) for part in parts]  # without any before the first outer step
        momentum = torch.cat([one.get("momentum_buffer", torch.zeros_like(phi)) for one in moments])
        settings.method = replace(settings.method, island=now)
        trainer = Trainer(settings, new)
        assert trainer.resumed.step == step
        assert trainer.resumed.state is None
        assert trainer.optimizer.in_sync
        found = flat(trainer.session.model)
        assert everywhere_equal(comm, found)
        mean = averaged_model(path)
        mean = torch.cat([mean[name].flatten() for name, _ in trainer.session.model.named_parameters()])
        flat_phi, flat_momentum = (_in_order(trainer, one) for one in (phi, momentum))
        delta = flat_phi - mean
        expected = flat_phi - 0.7 * (delta + 0.9 * (0.9 * flat_momentum + delta))
        if manifest["in_sync"]:
            expected = mean
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        trainer.run()
        comm.barrier("test.trained")


def _in_order(trainer, vector):
    """The elements of a flat buffer in the order of the model's parameters."""
    replica = trainer.optimizer._flat_replica
    kept = replica.parameters.clone()
    numel = min(kept.numel(), vector.numel())  # of which the last may be padding
    replica.parameters[:numel].copy_(vector[:numel])
    found = flat(trainer.session.model).clone()
    replica.parameters.copy_(kept)
    return found


def test_a_run_that_diverges_leaves_the_last_average(comm, place, monkeypatch):
    """That of the last evaluation, since no other average is on every rank while one is under way."""
    settings = config(place, "diverged", comm, method=MethodConfig("diloco", CONSTANT, overlap=2))
    trainer = Trainer(settings, comm)
    evaluated = []

    def spoil(optimizer, *_):
        if trainer.state.position.steps == 9 and comm.rank == comm.size - 1:
            flat_replica = trainer.optimizer._flat_replica
            flat_replica.parameters.fill_(torch.nan)

    trainer.optimizer.register_step_post_hook(spoil)
    evaluate = trainer._evaluate

    def remembering():
        found = evaluate()
        evaluated.append(flat(trainer.session.model).clone())
        return found

    monkeypatch.setattr(trainer, "_evaluate", remembering)
    monkeypatch.setattr("hvdlocal.training.saved_model.SNAPSHOT_SHARE", 1e6)
    with pytest.raises(DivergedError, match="The last good average is in"):
        trainer.run()
    comm.barrier("test.diverged")
    assert evaluated
    if comm.rank == 0:
        state = torch.load(trainer.output.path / "last_good.pt", weights_only=True)
        saved = torch.cat([state[name].flatten() for name, _ in trainer.session.model.named_parameters()])
        assert torch.equal(saved, evaluated[-1])


def test_another_outer_optimizer_is_refused(comm, place, monkeypatch):
    settings = config(place, "changed", comm, 2, method=MethodConfig("diloco", CONSTANT))
    train(comm, settings, monkeypatch, 7)
    for method, difference in (
        (MethodConfig("local", CONSTANT), "method.preset=diloco, not local"),
        (MethodConfig("diloco", CONSTANT, outer=OuterConfig(momentum=0.5)), "method.outer.momentum=null, not 0.5"),
        (MethodConfig("diloco", CONSTANT, overlap=1), "method.overlap=0, not 1"),
    ):
        with pytest.raises(SetupError, match=re.escape(difference)):
            Trainer(replace(settings, method=method), comm)


def test_a_checkpoint_from_before_there_were_outer_optimizers(comm, place, monkeypatch):
    settings = config(place, "older", comm, 3, method=MethodConfig("local", CONSTANT))
    whole = train(comm, config(place, "older whole", comm, method=MethodConfig("local", CONSTANT)), monkeypatch)
    root = train(comm, settings, monkeypatch, 10).output.path / "checkpoints"
    if comm.rank == 0:
        for step in files.newest_first(root):
            path = files.directory(root, step) / files.MANIFEST
            manifest = json.loads(path.read_text())
            new = ("method.outer.", "method.overlap", "method.mixing")
            manifest["settings"] = {k: v for k, v in manifest["settings"].items() if not k.startswith(new)}
            manifest["sha256"] = files._checksum(manifest)
            path.write_text(json.dumps(manifest))
    comm.barrier("test.old")
    final = train(comm, settings, monkeypatch)
    assert final.resumed.state is not None
    assert same(outcome(final.output.path), outcome(whole.output.path))


def test_an_exact_interval_is_kept_inside_an_overlap(comm, place, monkeypatch):
    """`every_steps` names steps, at which a checkpoint begins whatever is under way."""
    begun = []
    begin = CheckpointCoordinator._begin
    monkeypatch.setattr(CheckpointCoordinator, "_begin", lambda self, steps: (begun.append(steps), begin(self, steps)))
    method = MethodConfig("local", CONSTANT, overlap=4)
    trainer = train(comm, config(place, "exact", comm, 3, method=method), monkeypatch)
    last = trainer.state.position.steps
    assert begun == list(range(3, last, 3))
