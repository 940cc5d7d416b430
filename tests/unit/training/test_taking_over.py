"""The rank that takes the place of rank 0 leaves everything that rank 0 would have: records, models, callbacks' state."""

import json
from collections import Counter
from typing import ClassVar

import pytest
import torch
from support.mortal import Death
from support.records import records
from support.surviving_runs import AVERAGE, GRADIENTS, TEST, Job, configured, write_samples

from hvdlocal.training import Callback, CallbackError
from hvdlocal.training.callbacks.trackers.base import Tracker
from hvdlocal.training.config import CheckpointConfig, MethodConfig
from hvdlocal.training.run_state import Position


@pytest.fixture
def place(tmp_path):
    write_samples(tmp_path)
    return tmp_path


def saved(place, name):
    return torch.load(place / "out" / name, weights_only=True)


class Averages(Callback):
    """Keeps the average of each evaluation, on all ranks."""

    all_ranks = True
    seen: ClassVar[list[float]] = []

    def on_evaluation(self, run, record):
        self.seen.append(run.model.weight.item())


@pytest.mark.parametrize("at", [Death(0, AVERAGE, 4), Death(0, "hvdlocal.results")], ids=str)
def test_the_best_model_is_written_by_the_next_rank_if_rank_0_could_not(place, monkeypatch, at):
    """The first evaluation is the best, and rank 0 dies before its disk has the model of it."""
    monkeypatch.setattr(Position, "is_better", lambda self, value, direction: self.best is None)
    Averages.seen.clear()

    def cannot_write(rank, trainer):
        if rank == 0:
            monkeypatch.setattr(trainer.best_model, "write", lambda: None)

    job = Job(configured(place, epochs=3), at, callbacks=[Averages()], prepare=cannot_write)
    first, last = Averages.seen[0], Averages.seen[-1]
    assert first != last
    assert saved(place, "best.pt")["weight"].item() == first
    assert saved(place, "model.pt")["weight"].item() == last
    assert job.summary.best_value == records(place / "out", "evaluation")[0][job.summary.best_metric]


@pytest.mark.parametrize(
    "at",
    [
        Death(0, AVERAGE, 5),
        Death(0, "hvdlocal.poll", 4),
        Death(0, "hvdlocal.checkpoint", 1),
        Death(0, "hvdlocal.evaluation", 2),
        Death(0, "hvdlocal.results"),
    ],
    ids=str,
)
def test_no_record_is_lost_or_doubled(place, at):
    """With a line for every step, which rank 0 has written to the disk before it dies, or has not."""
    config = configured(place, log_every_seconds=0, checkpoint=CheckpointConfig(every_steps=5))
    job = Job(config, at)
    found = [(record["kind"], record["step"]) for record in records(place / "out")]
    steps, rounds = job.summary.steps, job.summary.rounds
    assert [step for kind, step in found if kind == "steps"] == list(range(1, steps + 1))
    assert [one["round"] for one in records(place / "out", "round")] == list(range(1, rounds + 1))
    assert sum(kind == "evaluation" for kind, _ in found) == 4
    assert found[-1] == ("end", steps)
    assert max(Counter(found).values()) == 1
    assert json.loads((place / "out" / "summary.json").read_text())["steps"] == steps


class Counting(Tracker):
    """Counts what it was told, and keeps the number in checkpoints; notes the records that it writes, by rank of the job."""

    written: ClassVar[dict[int, list]] = {}

    def __init__(self):
        self.rank = len(self.written)
        self.written[self.rank] = []
        self.count = 0

    def on_start(self, run):
        self.started = (run.rank, run.resumed_step, self.count)
        self.written[self.rank].append(self.started)

    def write(self, numbers, kind, step):
        self.count += 1
        self.written[self.rank].append((kind, step))

    def close(self, outcome):
        self.written[self.rank].append(outcome)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_a_tracker_begins_on_the_next_rank_with_the_state_and_the_records_since_the_newest_checkpoint(place):
    Counting.written.clear()
    config = configured(place, callbacks=[f"{__name__}:Counting"], checkpoint=CheckpointConfig(every_steps=5, keep=50))
    Job(config, Death(0, AVERAGE, 7))
    first, second = Counting.written[0][:-1], Counting.written[1]  # a thread that dies ends in good order
    expected = [
        (one["kind"], one["step"]) for one in records(place / "out") if one["kind"] in ("round", "evaluation", "steps")
    ]
    assert first[0] == (0, None, 0)
    assert first[1:] == expected[: len(first) - 1]
    _, step, count = second[0]
    assert step in (5, 10, 15)  # as fast as the disk was
    assert count == sum(one_step <= step for _, one_step in expected)
    assert second[1:-1] == [one for one in expected if one[1] > step]
    assert second[-1] == "finished"


def test_an_error_of_a_callback_on_the_next_rank_ends_the_run_with_a_checkpoint(place):
    class Failing(Callback):
        def on_take_over(self, run, taken):
            raise KeyError("here")

    with pytest.raises(
        CallbackError, match=r"Failing, on_take_over after step \d+: .*here.*the same command continues"
    ):
        Job(configured(place, epochs=30), Death(0, AVERAGE, 4), callbacks=[Failing()])


def test_data_parallelism_has_no_records_of_rounds(place):
    config = configured(place, method=MethodConfig("sync"), log_every_seconds=0, epochs=2)
    job = Job(config, Death(0, GRADIENTS, 4))
    assert [one["step"] for one in records(place / "out", "steps")] == list(range(1, job.summary.steps + 1))
    assert [one["samples"] for one in records(place / "out", "evaluation")] == [TEST, TEST]
