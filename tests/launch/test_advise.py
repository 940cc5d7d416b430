"""`hvdlocal advise` on ranks that really measure."""

import json
from types import SimpleNamespace

import pytest
from support.launch import HVDLOCAL, launch, mpirun

from hvdlocal.cli.configuration import parse
from hvdlocal.plan.payload import measure_payload


def test_two_ranks(config, tmp_path):
    result = mpirun(2, *HVDLOCAL, "advise", str(config), "--seconds", "3", "--json", str(tmp_path / "advice.json"))
    assert result.code == 0, result.err
    assert not (tmp_path / "out").exists(), "nothing is written where the run would be"
    assert "scale-invariant epoch" in result.out
    advice = json.loads((tmp_path / "advice.json").read_text())
    assert set(advice["m"]) == {"sync", "acc-lin", "acc-ada", "local-lin", "local-ada"}
    assert all(one["epoch"] > 0 and one["epoch_error"] >= 0 for one in advice["predictions"])
    assert advice["contest"]["verdict"] in ("local", "data-parallel", "undecided")
    images = SimpleNamespace(kind="images", shape=(8, 8, 1), classes=("a", "b", "c"))
    closings = advice["measured"]["blocks"][0]["closings"]
    for name, preset in (("acc-lin", "sync"), ("local-lin", "local"), ("local-ada sketch", "local-ada")):
        configured = parse([str(config), "--method.preset", preset])
        assert closings[name]["bytes"] == measure_payload(configured, images).round


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
