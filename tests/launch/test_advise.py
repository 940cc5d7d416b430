"""`hvdlocal advise` on ranks that really measure."""

import json
from types import SimpleNamespace

import pytest
from support.launch import HVDLOCAL, launch, mpirun

from hvdlocal.cli.configuration import parse
from hvdlocal.plan.payload import measure_payload


def test_four_ranks(config, tmp_path):
    options = ["--method.preset", "local-ada", "--method.island", "2", "--seconds", "3"]
    result = mpirun(4, *HVDLOCAL, "advise", str(config), *options, "--json", str(tmp_path / "advice.json"))
    assert result.code == 0, result.err
    assert not (tmp_path / "out").exists(), "nothing is written where the run would be"
    assert "scale-invariant epoch" in result.out
    advice = json.loads((tmp_path / "advice.json").read_text())
    parallel = {"sync", "acc-lin", "acc-ada"}
    assert set(advice["m"]) == parallel | {f"{name} overlapped" for name in parallel} | {"local-lin", "local-ada"}
    assert all(one["epoch"] > 0 and one["epoch_error"] >= 0 for one in advice["predictions"])
    assert advice["contest"]["verdict"] in ("local", "data-parallel", "undecided")
    assert set(advice["overlap"]) == {"sync", "acc-ada"}
    late = advice["averaging_overlap"]
    assert late["verdict"] in ("pays", "little", "undecided")
    assert all(1 <= one["overlap"] <= one["period"] for one in late["predictions"])
    assert "method.overlap" in result.out
    assert abs(advice["outer_seconds"]) < 10
    assert advice["measured"]["blocks"][0]["overlap"]["beyond"]["count"] > 0
    assert [one["island"] for one in advice["islands"]] == [1, 2], "four are one island: data parallelism"
    assert "Islands" in result.out
    measured = advice["measured"]["blocks"][0]["islands"]
    counts = {
        n: [times[part]["count"] > 0 for part in ("latency", "gradient", "average")] for n, times in measured.items()
    }
    assert counts == {"1": [False, False, True], "2": [True, True, True], "4": [True, True, False]}
    assert sum(bucket["bytes"] for bucket in advice["measured"]["buckets"]) == closings_bytes(advice, "acc-lin")
    images = SimpleNamespace(kind="images", shape=(8, 8, 1), classes=("a", "b", "c"))
    for name, preset in (("acc-lin", "sync"), ("local-lin", "local"), ("local-ada sketch", "local-ada")):
        configured = parse([str(config), "--method.preset", preset])
        assert closings_bytes(advice, name) == measure_payload(configured, images).round


def closings_bytes(advice, name):
    """The bytes of a step that ends in a collective."""
    return advice["measured"]["blocks"][0]["closings"][name]["bytes"]


def test_one_rank(config):
    result = launch(*HVDLOCAL, "advise", str(config), "--seconds", "1")
    assert result.code == 0, result.err
    assert "one rank has nothing to average" in result.out
    assert "micro-batch" in result.out


@pytest.mark.parametrize("mistake", [["--data.path", "/nowhere"], ["--json", "/proc/no/advice.json"]])
def test_mistakes_are_said_once_per_rank(config, mistake):
    result = mpirun(2, *HVDLOCAL, "advise", str(config), *mistake, timeout=60)
    assert result.code == 2
    assert "Traceback" not in result.err
    assert len([line for line in result.err.splitlines() if line.startswith("hvdlocal (rank")]) == 2
