"""`hvdlocal train`, `plan` and `advise` with many settings, by the ranks of this job; tests/launch has jobs of their own."""

import json
import os
import re
import signal

import pytest
import torch
from support.configs import write_config
from support.ranks import SIZE
from support.records import records

from hvdlocal.cli import main
from hvdlocal.models import build_model
from hvdlocal.training import interruption

pytestmark = pytest.mark.skipif(
    SIZE != 2 or os.environ.get("HVDLOCAL_BACKEND") == "mpi4py",
    reason="the numbers of steps below are those of two ranks; tests/launch trains over mpi4py",
)

PRESETS = ["sync", "local", "acc-lin", "acc-ada", "local-lin", "local-ada", "local-ada-nostale", "diloco", "slowmo"]


@pytest.fixture(autouse=True)
def _handlers():
    """Gives the signals back to pytest: the command installs handlers, and ignores signals when its run has ended."""
    numbers = [*interruption.SIGNALS, signal.SIGHUP]
    before = [signal.getsignal(number) for number in numbers]
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def output(place, request):
    """The output directory of this test's run."""
    return place / re.sub(r"\W+", "-", request.node.name)


@pytest.fixture
def config(place, output, tmp_path):
    """The file of a small run."""
    return str(write_config(tmp_path / "run.yaml", place / "data", output, evaluate_every_epochs=3))


@pytest.fixture
def hvdlocal(comm, capsys):
    """Runs a command that succeeds on all ranks, and returns what this rank printed."""

    def run(*arguments):
        code = main(list(map(str, arguments)))
        printed = capsys.readouterr()
        assert code == 0, printed.err
        comm.barrier("test.command")
        return printed.out

    return run


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_learns(comm, hvdlocal, config, output, preset):
    printed = hvdlocal("train", config, "--method.preset", preset, "--method.period.period", "2")
    assert (f"{preset} on 2 ranks" in printed) is (comm.rank == 0)
    end = records(output, "end")[0]
    assert end["evaluation"]["samples"] == 31, "every test image once"
    assert end["evaluation"]["accuracy"] == 1.0
    assert end["scale_invariant_epochs"] == pytest.approx(6, abs=0.7)
    micro_batches = 2 if preset.startswith("acc") else 1
    assert end["data_epochs"] == pytest.approx(end["steps"] * micro_batches * 2 * 8 / 96)
    per_round = {"sync": 1, "acc-lin": 2, "acc-ada": 2}.get(preset, 2)  # steps or micro-batches between collectives
    collectives = end["steps"] * micro_batches / per_round * (2 if preset == "local-ada-nostale" else 1)
    assert end["collectives"] == pytest.approx(collectives, abs=1)
    state = torch.load(output / "model.pt", weights_only=True)
    build_model("digits_cnn", 3, (8, 8, 1)).load_state_dict(state)


def test_metrics_hold_what_a_reader_needs(hvdlocal, config, output):
    hvdlocal("train", config, "--log_every_seconds", "0")
    steps, rounds = records(output, "steps"), records(output, "round")
    needed = {
        "step",
        "progress",
        "epoch",
        "loss",
        "accuracy",
        "lr",
        "gain",
        "period",
        "grad_sqr",
        "grad_var",
        "divergence",
    }
    needed |= {"computing_seconds", "averaging_seconds", "waiting_for_data_seconds", "bytes_sent"}
    assert needed <= set(steps[-1])
    assert [r["round"] for r in rounds] == list(range(1, len(rounds) + 1))
    assert all(r["divergence"] > 0 and r["grad_var"] > 0 for r in rounds)
    assert len({r["round_bytes_sent"] for r in rounds}) == 1, "the same in every round"
    assert all(0 < r["round_averaging_seconds"] < r["round_seconds"] for r in rounds)
    spent = [steps[-1][f"{name}_seconds"] for name in ("computing", "averaging", "waiting_for_data", "evaluating")]
    assert sum(spent) == pytest.approx(steps[-1]["elapsed_seconds"])
    resolved = (output / "config.yaml").read_text()
    assert "momentum: local" in resolved
    told = json.loads((output / "environment.json").read_text())
    assert told["ranks"] == 2
    assert len(told["hosts"]) == 2


def test_a_run_can_be_repeated_from_its_resolved_configuration(hvdlocal, config, output):
    again = output.with_name("again")
    hvdlocal("train", config)
    hvdlocal("train", output / "config.yaml", "--output", again)
    one, two = (torch.load(directory / "model.pt", weights_only=True) for directory in (output, again))
    assert all(torch.equal(one[name], two[name]) for name in one), "bit for bit"


SETTINGS = {
    "adamw": "--optimizer.name adamw --optimizer.lr 0.003 --method.momentum average",
    "qsr": "--method.period.rule qsr --method.period.alpha 0.03 --method.period.h_base 2",
    "post-local": "--method.preset local --method.period.rule post-local --method.period.switch_epochs 3",
    "adacomm-accumulate": "--method.period.rule adacomm --method.period.max_period 16 --method.accumulate 2",
    "reestimate-reset-exact": "--method.buffers reestimate --method.momentum reset --method.statistics exact",
    "bfloat16": "--precision bfloat16 --model.channels_last true --label_smoothing 0.1 --optimizer.max_norm 5",
    "step": "--schedule.name step --schedule.step_epochs 2 --schedule.warmup_epochs 1 --data.flip true",
    "streamed": "--data.tail partial --data.order block --data.storage stream --data.threads 2",
    "mixup": "--data.mixup 0.2 --data.image_size 8 --data.min_area 0.5 --data.share job",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(hvdlocal, config, output, name):
    hvdlocal("train", config, *SETTINGS[name].split())
    assert records(output, "end")[0]["evaluation"]["accuracy"] > 0.9


@pytest.mark.parametrize(
    "method",
    ["local-lin", "sync", "local-lin --method.overlap 2", "slowmo --method.overlap 4 --method.outer.momentum 0.2"],
)
def test_a_plan_counts_the_traffic_of_a_run(hvdlocal, config, output, method):
    settings = [config, "--method.preset", *method.split(), "--method.period.period", "3", "--data.tail", "drop"]
    plan = json.loads(hvdlocal("plan", *settings, "--workers", "2", "--json"))["plans"][0]
    hvdlocal("train", *settings)
    [end] = records(output, "end")
    for name in ("steps", "rounds", "collectives", "data_parallel_bytes"):
        assert plan[name] == end[name], name
    assert plan["bytes"] == end["bytes_sent"]
    assert plan["epochs"] == pytest.approx(end["scale_invariant_epochs"])
    assert plan["data_epochs"] == pytest.approx(end["data_epochs"])


def test_a_plan_tells_when_statistics_are_used(hvdlocal, config, output):
    """With overlap what travels with the first average is used in the third round, where nothing waits for it before."""
    settings = [config, "--method.preset", "local-ada", "--method.overlap", "2", "--evaluate_every_epochs", "100"]
    plan = json.loads(hvdlocal("plan", *settings, "--workers", "2", "--gain", "1.5", "--json"))["plans"][0]
    hvdlocal("train", *settings)
    gains = [record["gain"] for record in records(output, "round")]
    assert gains[:2] == [1, 1]
    assert 1 not in gains[2:]
    first_two = 2 * plan["stretches"][0]["period"]
    assert plan["mean_gain"] * plan["steps"] == pytest.approx(first_two + 1.5 * (plan["steps"] - first_two))


def test_advice_for_other_presets_and_settings(comm, hvdlocal, config):
    settings = (
        "--method.preset local-ada-nostale --method.accumulate 2 --method.statistics exact --optimizer.name adamw"
    )
    printed = hvdlocal("advise", config, "--seconds", "1", *settings.split(), "--precision", "bfloat16")
    assert ("local-ada-nostale" in printed) is (comm.rank == 0)
    assert ("the same in two collectives" in printed) is (comm.rank == 0)


def test_advice_for_an_outer_optimizer_with_overlap(comm, hvdlocal, config):
    settings = "--method.preset diloco --method.overlap 4 --method.mixing 0.5 --optimizer.name adamw"
    moments = ["--method.momentum", "{exp_avg: 2, exp_avg_sq: 4}"]
    printed = hvdlocal("advise", config, "--seconds", "1", *settings.split(), *moments)
    assert ("An outer optimizer (method.outer) changes what is learned" in printed) is (comm.rank == 0)


SHORT = ["--seconds", "1", "--method.preset", "acc-lin", "--method.period.period", "4", "--epochs", "0.2"]


def test_advice_for_a_run_that_is_over_before_the_measurements(hvdlocal, config):
    hvdlocal(
        "advise",
        config,
        *SHORT,
    )
