"""Checkpoints that are damaged, foreign or unfit; and a run that never comes to one."""

from __future__ import annotations

import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.faults import assert_the_same, assert_the_same_models

from hvdlocal.data import ShardWriter

pytestmark = pytest.mark.timeout(900)  # a test starts several jobs, each with a deadline of its own


def test_checkpoints_that_are_not_what_they_are_called(copied, undisturbed):
    """One bears the name of another step, one was left by another run."""
    *_, good, newest = copied.checkpoints
    place, foreign = copied.output / "checkpoints", undisturbed().checkpoints[-1]
    shutil.rmtree(place / f"step-{newest:010}")
    shutil.copytree(place / f"step-{good:010}", place / f"step-{newest:010}")
    shutil.copytree(undisturbed().output / f"checkpoints/step-{foreign:010}", place / f"step-{foreign:010}")
    result = copied.start(step=good)
    assert result.code == 0, result.err
    assert f"manifest.json is that of step {good}, so the directory has a wrong name: going back to" in result.err
    assert f"step-{foreign:010} was written by another run: going back to step {good}" in result.err
    assert_the_same(copied, undisturbed())


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_damaged_checkpoints(copied, undisturbed):
    good, *damaged = copied.checkpoints[-5:]
    files = [
        copied.output / f"checkpoints/step-{step:010}" / name
        for step, name in zip(damaged, ["manifest.json", "rank-00001.pt"] * 2, strict=True)
    ]
    for file, damage in zip(files, [truncate, truncate, flip_a_bit, flip_a_bit], strict=True):
        damage(file)
    result = copied.start(step=good)
    assert result.code == 0, result.err
    for file in files:
        assert re.search(f"WARNING: {re.escape(str(file))} .*: going back to step {good}", result.err), result.err
    assert_the_same(copied, undisturbed())


def test_no_checkpoint_that_is_not_damaged(copied):
    for step in copied.checkpoints:
        flip_a_bit(copied.output / f"checkpoints/step-{step:010}/rank-00000.pt")
    result = replace(copied, ranks=0).start()
    assert result.code == 2, result.err
    assert f"none of the {len(copied.checkpoints)} checkpoints in " in result.err
    assert "rank-00000.pt is damaged: its checksum is wrong" in result.err
    assert "--overwrite true" in result.err
    assert "Traceback" not in result.err


def test_a_run_that_is_continued_with_other_settings(copied, undisturbed, data, tmp_path):
    before = (copied.output / "metrics.jsonl").read_bytes()
    other = tmp_path / "other"
    shutil.copytree(data / "test", other / "test")
    images = np.random.default_rng(1).integers(0, 200, (96, 8, 8, 1), dtype=np.uint8)
    ShardWriter(other, "train", classes=["a", "b", "c"]).write(images, np.arange(96) % 3)
    for arguments, message in [
        (["--optimizer.lr", "0.03"], "an earlier run with optimizer.lr=0.02, not 0.03"),
        (["--data.path", str(other)], "other training data"),
    ]:
        result = replace(copied, ranks=0, arguments=tuple(arguments)).start()
        assert result.code == 2, result.err
        assert message in result.err
        assert (copied.output / "metrics.jsonl").read_bytes() == before
    result = replace(copied, arguments=("--log_every_seconds", "1", "--data.threads", "2")).start()
    assert result.code == 0, result.err
    assert_the_same_models(copied, undisturbed())


def test_a_run_that_never_comes_anywhere(make):
    """A batch system would start it again for ever."""
    run = make(ranks=0)
    for _ in range(3):
        assert run.start("kill:computing:0:2", SLURM_RESTART_COUNT="1").code == -signal.SIGKILL
    result = run.start(SLURM_RESTART_COUNT="1")
    assert result.code == 2, result.err
    assert "has been started 3 times from step 0 and never came to its next checkpoint" in result.err
