"""docs/records.md has every field of every record, and no other; what it calls a total never falls."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.records import records

import hvdlocal
from hvdlocal.cli import main
from hvdlocal.communicator import SingleProcess

PAGE = (Path(__file__).parents[3] / "docs" / "records.md").read_text(encoding="utf-8")


def table(kind: str) -> dict[str, str]:
    """The fields of a kind of record, each with how it is counted; empty where that is said elsewhere."""
    below = re.split(rf"^## .*{kind}.*$", PAGE, maxsplit=1, flags=re.MULTILINE)[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in below.splitlines() if line.startswith("| `")
    ]
    return {name: row[2] for row in rows for name in re.findall(r"`(\w+)`", row[0])}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("records")
    for split, count in (("train", 24), ("test", 9)):
        images = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 1), dtype=np.uint8)
        hvdlocal.ShardWriter(directory / "data", split, classes=["a", "b"]).write(images, np.arange(count) % 2)
    (directory / "run.yaml").write_text(
        f"data: {{path: {directory}/data, batch_size: 8}}\nmodel: {{name: digits_cnn}}\noutput: {directory}/out\nepochs: 4\n"
        "log_every_seconds: 0\nmethod: {period: {period: 2}}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvdlocal.communicator.launch._current", SingleProcess())
        assert main(["train", str(directory / "run.yaml")]) == 0
    return directory / "out"


@pytest.fixture(scope="module")
def recorded(directory):
    return records(directory)


def test_the_fields_of_the_environment(directory):
    assert set(json.loads((directory / "environment.json").read_text())) == set(table("`environment.json`:"))


def test_the_summary_is_the_last_record(directory, recorded):
    summary = json.loads((directory / "summary.json").read_text())
    assert {"kind": "end", "step": summary["steps"], **summary} == recorded[-1]
    assert (summary["model"], summary["ranks"], summary["period"]) == ("digits_cnn", 1, 2)
    assert summary["best_value"] == max(record["accuracy"] for record in recorded if record["kind"] == "evaluation")


@pytest.mark.parametrize("kind", ["round", "steps", "evaluation", "end"])
def test_the_fields(recorded, kind):
    fields = table("Every record") | table(f"`{kind}`:")
    of_kind = [record for record in recorded if record["kind"] == kind]
    assert of_kind
    assert all(set(record) == set(fields) for record in of_kind)
    for name in (name for name, counted in fields.items() if counted == "total"):
        values = [record[name] for record in of_kind]
        if all(isinstance(value, int | float) for value in values) and name != "computing_seconds":  # a rest
            assert all(earlier <= later for earlier, later in pairwise(values)), name


def test_one_meaning_of_a_name(recorded):
    """Of two kinds of record at the same step, totals of the same name are equal, but for the time between the two."""
    steps = {record["step"]: record for record in recorded if record["kind"] == "steps"}
    rounds = [record for record in recorded if record["kind"] == "round"]
    assert len(rounds) == 6
    totals = [name for name, counted in table("`round`:").items() if counted == "total" and "elapsed" not in name]
    for record in rounds:
        same = steps[record["step"]]
        assert {name: record[name] for name in totals if name in same} == {
            name: same[name] for name in totals if name in same
        }
