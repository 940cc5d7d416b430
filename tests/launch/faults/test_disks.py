"""Disks that are full, become full or cannot be written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.faults import assert_the_same

pytestmark = pytest.mark.timeout(900)  # a test starts several jobs, each with a deadline of its own


@contextmanager
def small_disk(directory: Path, size: str, *options: str) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    directory.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(directory)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_no_room_for_checkpoints(make, undisturbed):
    """Of no consequence, until the run is asked to leave."""
    runs = [make(), make()]
    for run in runs:  # an attempt without checkpoints, so that a disk can be where they belong
        run.output.mkdir()
        shutil.copy(undisturbed().output / "config.yaml", run.output)

    with small_disk(runs[0].output / "checkpoints", "64k"):
        result = runs[0].start()
        assert result.code == 0, result.err
        assert re.search("WARNING: no checkpoint of step 5: .*No space left on device.*Training goes on", result.err)
        assert runs[0].checkpoints == []
        assert_the_same(runs[0], undisturbed())

    with small_disk(runs[1].output / "checkpoints", "64k"):
        result = runs[1].start("usr2:computing:1:3")
        assert result.code == 1, result.err
        assert re.search("SIGUSR2 on rank 1, but no checkpoint of step [0-9]+: .*No space left on device", result.err)
        assert "Traceback" not in result.err


def test_a_small_disk(make, undisturbed):
    """Checkpoints give back the room that they could not use: training ends as if there were none, with all of its files."""
    plain = undisturbed()
    # From just enough for what is written without checkpoints to enough for two of them beside it.
    for kilobytes in (320, 640, 1200):
        run = make()
        with small_disk(run.output, f"{kilobytes}k"):
            result = run.start()
            assert result.code == 0, f"{kilobytes} KB\n{result.err}"
            assert "no checkpoint of step 5: " in result.err or kilobytes > 640
            assert "No space left on device" in result.err
            assert "Training goes on" in result.err
            assert "Traceback" not in result.err
            assert_the_same(run, plain)
            left = [path.name for path in run.output.rglob("*") if path.name.endswith(".tmp") or path.name == "reserve"]
            assert left == []


def test_a_disk_that_others_fill(make, undisturbed):
    run = make("--checkpoint.every_steps", "1000", ranks=0)  # with no checkpoint that would give its room back
    with small_disk(run.output, "4m"):
        result = run.start(f"fill={run.output}:computing:0:23")
        assert result.code == 1, result.err
        assert "Traceback" not in result.err
        assert re.search(r"cannot go on after step [0-9]+: .*No space left on device: '.*/metrics\.jsonl'", result.err)
        (run.output / "ballast").unlink()
        result = run.start()
        assert result.code == 0, result.err
        assert_the_same(run, undisturbed(ranks=0))


def test_a_disk_that_cannot_be_written(make):
    run = make()
    with small_disk(run.output, "64k", "ro"):
        result = run.start()
    assert result.code == 2, result.err
    said = [line for line in result.err.splitlines() if line.startswith("hvdlocal (rank")]
    assert {line[:17] for line in said} == {"hvdlocal (rank 0)", "hvdlocal (rank 1)"}
    assert all(re.search(r"/out/\.lock: Read-only file system", line) for line in said), said
    assert "Traceback" not in result.err
