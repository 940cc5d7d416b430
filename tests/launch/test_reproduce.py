"""A tiny grid, interrupted as by Ctrl-C and finished by the same command."""

import json
import math
import os
import signal
import subprocess
import time

import pytest
from support.launch import HVDLOCAL, ROOT, environment, launch


def test_ctrl_c_and_the_same_command_again(data, tmp_path):
    output = tmp_path / "runs"
    command = [*HVDLOCAL, "reproduce", "table2", "--methods", "local-ada", "--workers", "2", "--periods", "4"]
    command += ["--data", str(data), "--output", str(output), "--epochs=100", "--data.batch_size=8"]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    run = output / "local-ada-K2-H4-seed0"
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(**root), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 90
        while not (run / "metrics.jsonl").exists():  # training begins
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
    assert process.returncode == 85, said
    assert "interrupted: " in said
    assert list((run / "checkpoints").iterdir())
    assert not (run / "summary.json").exists()

    again = launch(*command, **root)
    assert again.code == 0, again.out + again.err
    log = (output / "logs" / "local-ada-K2-H4-seed0.log").read_text()
    assert "SIGUSR2 on rank" in log
    assert "continuing from the checkpoint of step" in log
    [row] = json.loads((output / "table2.json").read_text())["rows"]
    assert (row["method"], row["workers"], row["period"]) == ("local-ada", 2, 4)
    assert row["accuracy"] > 60


def test_rules_for_h_and_how_flat_their_minima_are(data, tmp_path):
    output = tmp_path / "runs"
    command = [*HVDLOCAL, "reproduce", "qsr", "--methods", "sync", "qsr", "--workers", "2", "--data", str(data)]
    command += ["--output", str(output), "--epochs=3", "--data.batch_size=64"]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    result = launch(*command, **root)
    assert result.code == 0, result.out + result.err
    found = json.loads((output / "qsr.json").read_text())
    [synchronous], [quadratic] = (row["runs"] for row in found["rows"])
    assert synchronous["outcome"]["communication"] == pytest.approx(1, rel=5e-3), (
        "and a few numbers beside the gradient"
    )
    assert 0 < quadratic["outcome"]["communication"] < 0.4
    for run in (synchronous, quadratic):
        assert run["curvature"]["largest"] > 0
        assert run["curvature"]["loss"] < math.log(10), "of the trained model, not of a fresh one"
    curvature = output / "qsr-K2-seed0" / "curvature.json"
    curvature.unlink()
    assert launch(*command, "--report", **root).code == 0
    assert not curvature.exists(), "a report only"
    again = launch(*command, **root)
    assert again.code == 0
    assert "[1/2]" not in again.out, "no other run"
    assert curvature.exists()
