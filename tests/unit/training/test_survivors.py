"""A run goes on after ranks have died: which samples are trained on, how long it is, and what is recorded, in closed form.

96 samples to train on, 31 to test, batches of 4 on 4 ranks: an epoch is 6 steps, or 8 of three ranks, or 12 of two.
"""

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from support.mortal import Death
from support.records import records
from support.surviving_runs import (
    AVERAGE,
    BATCH,
    EPOCHS,
    GRADIENTS,
    TEST,
    TRAIN,
    Job,
    configured,
    write_samples,
)

from hvdlocal.averaging import PostLocal
from hvdlocal.communicator import SetupError, SingleProcess
from hvdlocal.data.load.pipeline import Pipeline
from hvdlocal.training import Callback, Interrupted, Trainer
from hvdlocal.training.config import (
    CheckpointConfig,
    MethodConfig,
    OuterConfig,
    PeriodConfig,
    ScheduleConfig,
)


@pytest.fixture
def place(tmp_path):
    write_samples(tmp_path)
    return tmp_path


def lost(place):
    """The records of what was lost, in short."""
    return [
        (one["step"], one["ranks"], one["remaining"], one["round_samples_lost"])
        for one in records(place / "out", "lost")
    ]


def clock(place, kind="round"):
    """Where the run stood at each record of a kind."""
    return [(one["step"], one["progress"], one["epoch"], one.get("base_lr")) for one in records(place / "out", kind)]


@pytest.mark.parametrize("ahead", [False, True], ids=["made when wanted", "made ahead"])
@pytest.mark.parametrize("tail", ["carry", "partial"])
def test_every_sample_of_an_epoch_once(place, monkeypatch, tail, ahead):
    """Rank 1 dies at step 3, in the middle of an epoch, and ranks 0 and 3 at step 12."""
    if ahead:  # so small batches are made at once otherwise
        monkeypatch.setattr(Pipeline, "_at_once", False)
    config = configured(place, data={"tail": tail}, evaluate_every_epochs=10)
    job = Job(config, Death(1, AVERAGE, 1), Death(0, AVERAGE, 4), Death(3, AVERAGE, 4))
    # 3 steps of 16 and 9 of 12 hand out 156 of the 384 samples; the others are 57 steps of rank 2.
    assert lost(place) == [(3, [1], 3, 12), (12, [0, 3], 1, 24)]
    assert job.summary.ranks_lost == [0, 1, 3]
    assert [len(trained) for trained in job.trained] == [12 * BATCH, 3 * BATCH, 69 * BATCH, 12 * BATCH]
    assert records(place / "out", "steps")[-1]["loader_samples"] == len(job.trained[2])
    assert Counter(chain(*job.trained)) == dict.fromkeys(range(TRAIN), EPOCHS)
    first_epoch = [sample for trained in job.trained for sample in trained[: 7 * BATCH]]
    assert Counter(first_epoch) == dict.fromkeys(range(TRAIN), 1)


@pytest.mark.parametrize(("average", "evaluations"), [(1, [9, 15, 24, 31]), (2, [6, 15, 24, 30])])
def test_budget_and_schedule_are_those_of_the_ranks_that_are_left(place, average, evaluations):
    """They are those of a run that was interrupted there and goes on on three ranks."""
    Job(configured(place), Death(3, AVERAGE, average))
    # 3 or 6 steps are 1/2 or 1 epoch of four ranks, the others are 8 to an epoch of three.
    assert clock(place)[-1][:3] == (evaluations[-1], 32.0, 4.0)
    assert [step for step, *_ in clock(place, "evaluation")] == evaluations, "at the first average of each epoch"
    survived = [clock(place, kind) for kind in ("round", "evaluation")]
    (place / "out").rename(place / "survived")

    config = configured(place, min_workers=4)
    reason = Job(config, Death(3, AVERAGE, average)).results[0]
    assert isinstance(reason, Interrupted)
    config.min_workers = 1
    assert Job(config, ranks=3).summary.ranks_lost == []
    assert [clock(place, kind) for kind in ("round", "evaluation")] == survived


def test_rules_are_those_of_the_ranks_that_are_left(place):
    """The switch of post-local is in epochs, and SlowMo's default momentum depends on the number of workers."""
    method = MethodConfig("slowmo", period=PeriodConfig("post-local", period=4, switch_epochs=2), outer=OuterConfig())
    job = Job(configured(place, method=method, schedule=ScheduleConfig("constant")), Death(2, AVERAGE, 1))
    optimizer = job.trainers[0].optimizer
    assert repr(optimizer.period_rule) == repr(PostLocal(16.0, 4))
    assert optimizer._outer._optimizer.param_groups[0]["momentum"] == 0.0
    alone = Job(configured(place, method=method, overwrite=True), ranks=4).trainers[0].optimizer
    assert repr(alone.period_rule) == repr(PostLocal(12.0, 4))
    assert alone._outer._optimizer.param_groups[0]["momentum"] == 0.2


def test_data_parallelism(place):
    """The gradient of one step is that of three ranks; the lost rank's batch of this step is in no average."""
    Job(configured(place, method=MethodConfig("sync")), Death(0, GRADIENTS, 5))
    assert lost(place) == [(5, [0], 3, BATCH)]
    page = (Path(__file__).parents[3] / "docs" / "records.md").read_text(encoding="utf-8")
    table = page.split("\n## `lost`")[1].split("\n## ")[0]
    documented = [name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)]
    (record,) = records(place / "out", "lost")
    assert list(record) == ["kind", "step", *documented]
    assert (record["hosts"], record["collective"].startswith(GRADIENTS)) == (["node0"], True)


def test_an_average_under_way_is_lost_with_the_steps_behind_it(place):
    """It was begun after 6 steps and is applied after 8."""
    method = MethodConfig("local", period=PeriodConfig(period=3), overlap=2)
    Job(configured(place, method=method, evaluate_every_epochs=10), Death(3, AVERAGE, 2))
    assert lost(place) == [(8, [3], 3, 5 * BATCH)]


def test_samples_of_a_round_in_which_ranks_are_lost_twice(place, monkeypatch):
    """At the exchanges of steps 1 and 2, read at 2 and 4: rank 2 has taken 2 batches among four ranks and 2 among three."""
    monkeypatch.setattr("hvdlocal.training.status_exchange.POLL_SECONDS", 1e6)
    method = MethodConfig("local", period=PeriodConfig(period=6))
    Job(configured(place, method=method), Death(3, "hvdlocal.poll", 1), Death(2, "hvdlocal.poll", 2))
    assert lost(place) == [(2, [3], 3, 2 * BATCH), (4, [2], 2, 4 * BATCH)]


@pytest.mark.parametrize("collective", ["hvdlocal.metrics", "hvdlocal.evaluation"])
@pytest.mark.parametrize("rank", [0, 2])
def test_an_interrupted_evaluation_is_made_again(place, collective, rank):
    """It holds all test samples, those of the lost rank too: the loss is that of one process."""
    job = Job(configured(place, epochs=1), Death(rank, collective, 1))
    assert lost(place) == [(6, [rank], 3, 0)]
    (evaluation,) = records(place / "out", "evaluation")
    x = torch.arange(TEST, dtype=torch.float32)[:, None]
    model = torch.nn.Linear(1, 1)
    model.load_state_dict(torch.load(place / "out" / "model.pt", weights_only=True))
    with torch.no_grad():
        expected = (model(x) - x / 100).square().mean().item()
    assert (evaluation["samples"], evaluation["loss"]) == (TEST, pytest.approx(expected))
    assert job.summary.evaluation.samples == TEST


COLLECTIVES = [
    (AVERAGE, 1),
    (AVERAGE, 3),
    ("hvdlocal.poll", 1),
    ("hvdlocal.poll", 2),
    ("hvdlocal.checkpoint", 1),
    ("hvdlocal.checkpoint", 2),
    ("hvdlocal.evaluation", 2),
    ("hvdlocal.checkpoint.complete", 1),
    ("hvdlocal.results", 1),
]


@pytest.mark.parametrize(("collective", "occurrence"), COLLECTIVES)
@pytest.mark.parametrize("ranks", [(0,), (0, 1), (1, 2, 3)], ids=str)
def test_nothing_else_is_lost(place, collective, occurrence, ranks):
    """Whichever collective finds that ranks are lost, the records are complete, each once, and so are the files."""
    config = configured(place, checkpoint=CheckpointConfig(every_steps=4))
    job = Job(config, *(Death(rank, collective, occurrence) for rank in ranks))
    first = job.summary
    assert sum(result is None for result in job.results) == len(ranks)
    left = [trainer for trainer, result in zip(job.trainers, job.results, strict=True) if result is not None]
    states = [trainer.session.model.state_dict() for trainer in left]
    saved = torch.load(place / "out" / "model.pt", weights_only=True)
    assert all(torch.equal(state[name], saved[name]) for state in states for name in saved)

    kinds = Counter(record["kind"] for record in records(place / "out"))
    expected = {"round": first.rounds, "evaluation": EPOCHS, "end": 1, "steps": 1}
    if collective != "hvdlocal.results":  # where it is too late for a record
        expected["lost"] = 1
        assert lost(place)[0][1] == list(ranks)
        assert first.ranks_lost == list(ranks)
    assert {kind: kinds[kind] for kind in expected} == expected
    assert [one["round"] for one in records(place / "out", "round")] == list(range(1, first.rounds + 1))
    assert all(one["samples"] == TEST for one in records(place / "out", "evaluation"))
    end = records(place / "out")[-1]
    summary = json.loads((place / "out" / "summary.json").read_text())
    assert end.keys() == {"kind", "step", *summary}
    own = {"seconds", "samples_per_second", "date"}  # of the rank that has written it
    assert all(end[name] == value for name, value in summary.items() if name not in own)
    best = torch.load(place / "out" / "best.pt", weights_only=True)
    assert best.keys() == saved.keys()
    assert first.data_epochs >= EPOCHS


@pytest.mark.parametrize("rank", [0, 3])
def test_too_few_leave_with_a_checkpoint_from_which_all_ranks_go_on(place, rank):
    config = configured(place, min_workers=3, evaluate_every_epochs=10)
    job = Job(config, Death(rank, AVERAGE, 2), Death(1, AVERAGE, 3))
    reasons = [result for result in job.results if result is not None]
    assert len(reasons) == 2
    assert all(isinstance(reason, Interrupted) and reason.code == 85 for reason in reasons)
    assert "interrupted after step 9: 2 ranks are left of 4, fewer than min_workers=3" in str(reasons[0])
    handed_out = 6 * 16 + 3 * 12
    again = Job(config)
    assert [result.ranks_lost for result in again.results] == [[]] * 4
    # 252 samples are left, 15.75 steps of 16.
    assert again.summary.steps == 9 + 16
    assert again.summary.data_epochs == (handed_out + 16 * 16) / TRAIN
    assert lost(place) == [(6, [rank], 3, 12), (9, [1], 2, 12)], "as is recorded before the checkpoint"
    assert [one["round"] for one in records(place / "out", "round")] == list(range(1, again.summary.rounds + 1))


def test_a_rank_that_is_lost_during_set_up_ends_the_run(place):
    job = Job(configured(place), Death(2, "hvdlocal.prepare", 1))
    reasons = [result for result in job.results if result is not None]
    assert len(reasons) == 3
    assert all(isinstance(reason, Interrupted) and reason.code == 85 for reason in reasons)
    expected = "interrupted before training began: rank 2 on node2 is lost; the other 3 ranks go on"
    assert all(str(reason).startswith(expected) for reason in reasons)
    assert Job(configured(place)).summary.steps == 24, "the same command starts again"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_workers": 5}, "min_workers=5, but the job has 4 ranks"),
        ({"data": {"tail": "drop"}}, r"data\.tail=drop with survive"),
    ],
)
def test_what_cannot_survive_is_refused_before_training(place, settings, message):
    with pytest.raises(SetupError, match=message):
        Job(configured(place, **settings))
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"survive": True},
            r"survive=true, but the communicator ends .* hvdlocal\.init\(backend=.mpi4py., survive=True\)",
        ),
        ({"survive": False, "min_workers": 2}, "min_workers=2 without survive"),
    ],
)
def test_a_communicator_that_does_not_survive_is_refused(place, settings, message):
    with pytest.raises(SetupError, match=message):
        Trainer(configured(place, **settings), SingleProcess())


class Heard(Callback):
    """Notes its events on the rank that has it."""

    heard: ClassVar[list[tuple]] = []

    def on_start(self, run):
        self.heard.append((run.rank, run.num_workers, run.resumed_step, run.epoch, "start"))

    def on_evaluation(self, run, record):
        self.heard.append((run.rank, run.num_workers, run.step, run.epoch, record["samples"]))


@pytest.mark.parametrize("given", [True, False], ids=["an object", "a name"])
def test_callbacks_of_the_first_rank_begin_on_the_next_one(place, given):
    """So do those of the package: two files of TensorBoard are one curve."""
    Heard.heard.clear()
    names = [] if given else [f"{__name__}:Heard"]
    config = configured(place, epochs=2, callbacks=names)
    Job(config, Death(0, AVERAGE, 2), callbacks=[Heard()] if given else [])
    assert Heard.heard == [
        (0, 4, None, 0.0, "start"),
        (0, 3, 0, 1.0, "start"),
        (0, 3, 6, 1.0, TEST),
        (0, 3, 14, 2.0, TEST),
    ]
