"""What a run recorded, read back: of all states, and with damage."""

import json
import os
import time

import numpy as np
import pytest
from recorded import BYTES_PER_AVERAGING, write_run
from support.records import records

from hvdlocal.report.records import SILENCE_SECONDS, RecordedState, Series, read_run


def test_a_finished_run(tmp_path):
    run = read_run(write_run(tmp_path / "a", workers=2, period=4, steps=800))
    assert run.state is RecordedState.FINISHED
    assert (run.preset, run.num_workers, run.accumulate) == ("local-ada", 2, 1)
    assert (run.num_steps, run.num_averagings) == (800, 200)
    assert len(run.rounds) == 200
    assert len(run.steps) == 16
    assert len(run.evaluations) == 8
    assert run.history is run.rounds
    assert run.metrics == ["loss", "accuracy"]
    assert run.best == (pytest.approx(1 - 10 / 800), 8.0)
    assert run.data_parallel_share == pytest.approx(1 / 4)
    assert run.seconds["elapsed"] == 8
    assert run.measured_m == pytest.approx((0.003 * 4) / 0.005)
    assert run.notes == []


def test_data_parallelism_has_no_rounds(tmp_path):
    run = read_run(write_run(tmp_path / "a", "acc-ada", period=16))
    assert run.history is run.steps
    assert run.accumulate == 16
    assert run.num_averagings == run.num_steps == 800
    assert run.measured_m == pytest.approx(16 * 0.003 / 0.005)


@pytest.mark.parametrize("finished", [False, True])
def test_an_island_is_one_worker(tmp_path, finished):
    """A local step is its computing and the wait for the island's gradient: m is that of islands."""
    run = read_run(write_run(tmp_path / "a", workers=2, island_size=4, period=4, finished=finished))
    assert (run.ranks, run.island_size, run.num_workers) == (8, 4, 2)
    assert run.seconds["inside_islands"] == pytest.approx(0.8)
    assert run.measured_m == pytest.approx((0.003 * 4) / 0.005)
    older = read_run(write_run(tmp_path / "b", workers=2, finished=finished))
    assert (older.ranks, older.island_size, older.num_workers) == (2, 1, 2)
    assert older.seconds["inside_islands"] == 0


def test_hidden_averages(tmp_path):
    """An averaging takes what is exposed and what is hidden; the other times add up to the elapsed one without the latter."""
    run = read_run(write_run(tmp_path / "overlap", "diloco", hidden=0.006))
    assert run.num_averagings == 200
    assert run.seconds["hidden"] == pytest.approx(4.8)
    assert run.measured_m == pytest.approx((0.003 + 0.006) * 4 / 0.005)
    under_way = read_run(write_run(tmp_path / "under way", hidden=0.006, finished=False))
    assert under_way.seconds == pytest.approx(run.seconds)
    assert read_run(write_run(tmp_path / "older")).seconds["hidden"] == 0


@pytest.mark.parametrize("size", [3, 0, "4", None, True])
def test_islands_that_are_no_part_of_the_ranks(tmp_path, size):
    directory = write_run(tmp_path / "a")
    (directory / "environment.json").write_text(json.dumps({"ranks": 8, "island_size": size}))
    with pytest.raises(ValueError, match="has no valid island_size"):
        read_run(directory)


def test_one_rank_sends_nothing(tmp_path):
    run = read_run(write_run(tmp_path / "a", workers=1))
    assert run.data_parallel_share is None
    assert run.measured_m is None
    assert run.bytes_at(np.array([400.0])) == 0


def test_bytes_between_two_records(tmp_path):
    run = read_run(write_run(tmp_path / "a", period=4))
    assert run.bytes_at(np.array([0.0, 2, 4, 800])).tolist() == [
        0,
        BYTES_PER_AVERAGING / 2,
        BYTES_PER_AVERAGING,
        200_000,
    ]


def test_rounds_of_a_run_that_was_begun_by_an_older_version(tmp_path):
    """Their records have totals up to the resumption, and what each round sent after it."""
    directory = write_run(tmp_path / "a", period=4)
    path = directory / "metrics.jsonl"
    recorded = records(directory)
    for record in recorded:
        if record["kind"] == "round" and record["step"] > 400:
            del record["bytes_sent"]
            record["round_bytes_sent"] = BYTES_PER_AVERAGING
    path.write_text("".join(json.dumps(record) + "\n" for record in recorded if record["kind"] != "steps"))
    run = read_run(directory)
    assert run.bytes_at(np.array([2.0, 400, 402, 404, 800])).tolist() == [500, 100_000, 100_500, 101_000, 200_000]


def test_running_and_interrupted(tmp_path):
    directory = write_run(tmp_path / "a", steps=450, finished=False)
    assert read_run(directory).state is RecordedState.RUNNING
    silent = time.time() - SILENCE_SECONDS - 5
    os.utime(directory / "metrics.jsonl", (silent, silent))
    run = read_run(directory)
    assert run.state is RecordedState.INTERRUPTED
    assert run.data_parallel_share == pytest.approx(112 * BYTES_PER_AVERAGING / (450 * BYTES_PER_AVERAGING))
    assert run.seconds["elapsed"] == pytest.approx(4.5)


def test_diverged_until_it_goes_on(tmp_path):
    directory = write_run(tmp_path / "a", steps=450, finished=False)
    (directory / "last_good.pt").touch()
    assert read_run(directory).state is RecordedState.DIVERGED
    earlier = time.time() - 2 * SILENCE_SECONDS
    os.utime(directory / "last_good.pt", (earlier, earlier))
    assert read_run(directory).state is RecordedState.RUNNING


def test_a_long_pause_is_no_interruption(tmp_path):
    directory = write_run(tmp_path / "a", steps=10, finished=False)
    evaluation = {"progress": 10.0, "epoch": 0.1, "data_epoch": 0.1, "loss": 1.0, "accuracy": 0.1}
    with (directory / "metrics.jsonl").open("a") as file:
        for seconds in (600, 1200):
            record = {"kind": "evaluation", "step": 10, **evaluation, "elapsed_seconds": seconds}
            file.write(json.dumps(record) + "\n")
    silent = time.time() - 1000
    os.utime(directory / "metrics.jsonl", (silent, silent))
    assert read_run(directory).state is RecordedState.RUNNING


@pytest.mark.parametrize(
    "tail", [b'{"kind": "steps", "step": 9', b'{"kind": "round", "loss": 1.5e', "{σ".encode()[:-1], b"\0\0\0\0"]
)
def test_a_torn_last_line(tmp_path, tail):
    directory = write_run(tmp_path / "a", finished=False)
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    run = read_run(directory)
    assert run.num_steps == 800
    assert run.notes == ["the last line of metrics.jsonl is incomplete and left out"]


def test_cut_anywhere(tmp_path):
    """Whatever a job has written when it is read: no error, and never more than there was."""
    directory = write_run(tmp_path / "a", steps=20)
    whole = (directory / "metrics.jsonl").read_bytes()
    rounds = []
    for end in range(0, len(whole), 7):
        (directory / "metrics.jsonl").write_bytes(whole[:end])
        rounds.append(len(read_run(directory).rounds))
    assert rounds == sorted(rounds)
    assert (rounds[0], rounds[-1]) == (0, 5)


def test_lost_ranks(tmp_path):
    directory = write_run(tmp_path / "a", steps=800)
    with open(directory / "metrics.jsonl", "a") as file:
        for ranks, remaining in (([3], 3), ([0, 1], 1), ("all", 0)):
            hosts = [f"node{rank}" for rank in ranks]
            print(
                json.dumps({"kind": "lost", "step": 900, "ranks": ranks, "hosts": hosts, "remaining": remaining}),
                file=file,
            )
    assert read_run(directory).notes == [
        "after step 900 3 ranks went on without rank 3 on node3",
        "after step 900 one rank went on without ranks 0 on node0, 1 on node1",
    ]


def test_resumptions(tmp_path):
    directory = write_run(tmp_path / "a")
    attempts = directory / "attempts.jsonl"
    attempts.write_text('{"step": 0, "ranks": 2}\n')
    assert read_run(directory).notes == []
    attempts.write_text('{"step": 0, "ranks": 2}\n{"step": 1400, "ranks": 4}\n{"st')
    assert read_run(directory).notes == ["interrupted and resumed from step 1,400 on 4 ranks"]


def test_null_is_nan_and_absent_too():
    series = Series([{"step": 1, "loss": None}, {"step": 2, "loss": 0.5, "new": 3}])
    assert np.isnan(series["loss"][0])
    assert series["loss"][1] == 0.5
    assert np.isnan(series["new"][0])
    assert np.isnan(series["nothing"]).all()
    assert series.last("nothing") is None
    assert series.last("new") == 3
    assert Series().last("step") is None


def test_no_run(tmp_path):
    for directory, message in (
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path, "no metrics.jsonl and no config.yaml and no environment.json"),
    ):
        with pytest.raises(ValueError, match=message):
            read_run(directory)
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    with pytest.raises(ValueError, match=r"not a run, but 2 are in it: give .*/\*"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="is a file: give the run's directory"):
        read_run(tmp_path / "a" / "metrics.jsonl")
    (tmp_path / "a" / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"it has no config\.yaml; give"):
        read_run(tmp_path / "a")


DAMAGE = [
    ("metrics.jsonl", '{"kind": "st\n{"kind": "other", "step": 9}\n', "line 1 is damaged"),
    ("metrics.jsonl", '{"kind": "other", "step": 1, "x": NaN}\n{"kind": "other", "step": 2}\n', "NaN is not JSON"),
    ("metrics.jsonl", '["kind"]\n{"kind": "other", "step": 2}\n', "line 1: not a record"),
    ("metrics.jsonl", '{"kind": "steps", "step": 1}\n', "without progress, epoch"),
    (
        "metrics.jsonl",
        '{"kind": "other", "step": 2}\n{"kind": "other", "step": 1}\n',
        "line 2: goes back from step 2 to 1",
    ),
    ("config.yaml", "a: [", "damaged"),
    ("config.yaml", "", "empty"),
    ("config.yaml", "model: 1", "is not a run"),
    ("environment.json", '{"ranks"', "damaged"),
    ("environment.json", "{}", "is not a run"),
]


@pytest.mark.parametrize(("name", "text", "message"), DAMAGE)
def test_damage(tmp_path, name, text, message):
    directory = write_run(tmp_path / "a")
    (directory / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_run(directory)
    assert str(directory / name) in str(error.value)
    assert "\n" not in str(error.value)
