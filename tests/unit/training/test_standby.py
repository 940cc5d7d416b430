"""metrics.jsonl when the rank that writes it dies: wherever that happens, each record is in the file once."""

import json
import os

import pytest

from hvdlocal.directory import Directory
from hvdlocal.training.metrics import BUFFER_BYTES, METRICS, JsonLines
from hvdlocal.training.standby import Standby


def common(last_step):
    """The records that every rank writes: of rounds, of evaluations, and two losses after one step."""
    for step in range(1, last_step + 1):
        if step % 2 == 0:
            yield "round", step
        if step % 6 == 0:
            yield "evaluation", step
        if step == 8:
            yield "lost", step
            yield "lost", step


def all_records(last_step, lines):
    """The records of one rank up to a step, in its order: its lines of the clock come first."""
    others = list(common(last_step))
    for step in range(1, last_step + 1):
        if step in lines:
            yield "steps", step
        yield from (one for one in others if one[1] == step)


def write(metrics, records, rank):
    for number, (kind, step) in enumerate(records):
        metrics.write(kind, step, rank=rank, number=number, loss=float("nan"))


def in_file(path):
    text = (path / METRICS).read_text()
    assert text.endswith("\n")
    return [(record["kind"], record["step"]) for record in map(json.loads, text.splitlines())]


def without_lines(records):
    return [one for one in records if one[0] != "steps"]


def steps_of_lines(records):
    return [step for kind, step in records if kind == "steps"]


def of_first_rank(path, records):
    """What the first rank has written to the file when it has handed everything over."""
    metrics = JsonLines(Directory(path))
    write(metrics, records, rank=0)
    metrics.close()
    return (path / METRICS).read_bytes()


@pytest.mark.parametrize("own_lines", [{1, 4, 7, 9}, {2, 8, 11}, set()])
def test_wherever_the_first_rank_died_each_record_is_there_once(tmp_path, own_lines):
    text = of_first_rank(tmp_path, all_records(12, {3, 5, 8, 10}))
    for size in range(len(text) + 1):  # torn inside a line, before one, or not at all
        (tmp_path / METRICS).write_bytes(text[:size])
        standby = Standby(Directory(tmp_path))
        write(standby, all_records(12, own_lines), rank=1)
        standby.take_over()
        standby.write("round", 14)
        standby.close()
        found = in_file(tmp_path)
        assert without_lines(found) == [*common(12), ("round", 14)]
        lines = steps_of_lines(found)
        assert lines == sorted(set(lines))
        steps = [step for _, step in found]
        assert steps == sorted(steps)


def test_with_a_line_for_every_step_none_is_missing(tmp_path):
    every = set(range(1, 13))
    text = of_first_rank(tmp_path, all_records(12, every))
    for size in range(len(text) + 1):
        (tmp_path / METRICS).write_bytes(text[:size])
        standby = Standby(Directory(tmp_path))
        write(standby, all_records(12, every), rank=1)
        standby.take_over()
        standby.close()
        assert in_file(tmp_path) == list(all_records(12, every))


def test_what_the_first_rank_wrote_stays_as_it_was(tmp_path):
    text = of_first_rank(tmp_path, all_records(12, {3}))
    half = text.index(b"\n", len(text) // 2) + 1
    (tmp_path / METRICS).write_bytes(text[:half] + b'{"kind": "rou')
    standby = Standby(Directory(tmp_path))
    write(standby, all_records(12, set()), rank=1)
    standby.take_over()
    standby.take_over()  # does nothing
    standby.close()
    found = (tmp_path / METRICS).read_bytes()
    assert found.startswith(text[:half])
    assert all(json.loads(line)["rank"] == 1 for line in found[half:].splitlines())


def test_lines_that_a_dead_node_never_wrote_are_written_again(tmp_path):
    """A file server may have the end of a file and not what was before it, which is zeros then."""
    text = of_first_rank(tmp_path, all_records(12, set()))
    lines = text.splitlines(keepends=True)
    (tmp_path / METRICS).write_bytes(b"".join([*lines[:3], b"\0" * len(lines[3]), *lines[4:]]))
    standby = Standby(Directory(tmp_path))
    write(standby, all_records(12, set()), rank=1)
    standby.take_over()
    standby.close()
    assert in_file(tmp_path) == list(common(12))


def test_ranks_that_die_one_after_another(tmp_path):
    text = of_first_rank(tmp_path, all_records(6, {2, 5}))
    for first in range(0, len(text) + 1, 7):
        (tmp_path / METRICS).write_bytes(text[:first])
        second = Standby(Directory(tmp_path))
        write(second, all_records(9, {3, 9}), rank=1)
        second.take_over()
        second.close()
        appended = (tmp_path / METRICS).read_bytes()
        for size in range(first, len(appended) + 1, 5):  # the second dies while it appends
            (tmp_path / METRICS).write_bytes(appended[:size])
            third = Standby(Directory(tmp_path))
            write(third, all_records(12, {1, 4, 8}), rank=2)
            third.take_over()
            third.close()
            found = in_file(tmp_path)
            assert without_lines(found) == list(common(12))
            assert steps_of_lines(found) == sorted(set(steps_of_lines(found)))


def test_records_of_an_earlier_start_are_not_taken_for_those_of_this_one(tmp_path):
    """A rank was lost just before the checkpoint from which the run continues, and another one just after that."""
    (tmp_path / METRICS).write_text('{"kind": "lost", "step": 8, "rank": 3}\n')
    keep = os.path.getsize(tmp_path / METRICS)
    standby = Standby(Directory(tmp_path), keep)
    standby.write("lost", 8, rank=2)
    standby.take_over()
    standby.close()
    assert in_file(tmp_path) == [("lost", 8), ("lost", 8)]


def test_a_standby_keeps_only_what_the_file_lacks(tmp_path):
    first, standby = JsonLines(Directory(tmp_path)), Standby(Directory(tmp_path))
    most = 0
    for step in range(1, 4001):
        for metrics in (first, standby):
            metrics.write("round", step, text="x" * 80)
        most = max(most, standby.bytes)
    size = (tmp_path / METRICS).stat().st_size
    assert size > 5 * BUFFER_BYTES
    assert most < 3 * BUFFER_BYTES
    standby.take_over()  # the first one dies with what is in its memory
    standby.close()
    assert in_file(tmp_path) == [("round", step) for step in range(1, 4001)]


def test_a_record_that_repeats_kind_and_step_is_not_forgotten(tmp_path):
    """The standby looks at the file between two losses after the same step, of which the file has the first."""
    first, standby = JsonLines(Directory(tmp_path)), Standby(Directory(tmp_path))
    for metrics in (first, standby):
        for step in range(1, 10):
            metrics.write("round", step, text="x" * (BUFFER_BYTES // 9 - 80))
        kept = standby.bytes
        metrics.write("lost", 9, text="x" * 720)  # more than a standby keeps without a look
        metrics.flush()
    assert standby.bytes < kept
    standby.write("lost", 9)
    standby.take_over()
    standby.close()
    assert [one for one in in_file(tmp_path) if one[0] == "lost"] == [("lost", 9), ("lost", 9)]


def test_a_rank_that_is_not_the_first_writes_nothing(tmp_path):
    standby = Standby(Directory(tmp_path))
    write(standby, all_records(12, {2}), rank=1)
    standby.flush()
    assert standby.position() == 0
    standby.close()
    assert list(tmp_path.iterdir()) == []
    first = Standby(Directory(tmp_path))
    write(first, all_records(2, {2}), rank=1)
    first.take_over()
    assert first.position() == (tmp_path / METRICS).stat().st_size > 0
    first.close()
