"""A script with a loop of its own is killed and asked to stop: the next start comes to the same bits."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support.launch import MPIRUN, ROOT, Result, launch

pytestmark = pytest.mark.timeout(900)  # several jobs, each with a deadline of its own


def start(output: Path, *faults: str, ranks: int = 2) -> Result:
    script = [str(ROOT / "examples" / "own_loop.py"), str(output)]
    faulty = [sys.executable, str(ROOT / "tests/launch/faulty.py")]
    result = launch(*MPIRUN, "-np", str(ranks), *faulty, *faults, *script, timeout=150)
    assert len([line for line in result.err.splitlines() if " at stepping " in line]) == len(faults), result.err
    return result


def test_it_continues_where_it_was(tmp_path):
    assert start(tmp_path / "whole").code == 0
    run = tmp_path / "run"

    killed = start(run, "kill:stepping:1:101")
    assert killed.code not in (0, 2, 3, 85), "the templates start it again"

    asked = start(run, "term:stepping:1:3")
    assert asked.code == 85, asked.err
    assert "Traceback" not in asked.err
    (newest,) = sorted(run.glob("checkpoints/step-*"))[-1:]
    assert f"interrupted after step {int(newest.name[5:])}: SIGTERM on rank 1" in asked.out
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["in_sync"] is False, "it is inside a round"

    alone = start(Path(shutil.copytree(run, tmp_path / "alone", symlinks=True)), ranks=1)
    assert alone.code == 0, alone.err
    assert f"continuing from the checkpoint of step {manifest['step']}, averaged over the 2 ranks" in alone.out

    final = start(run)
    assert final.code == 0, final.err
    assert f"continuing from the checkpoint of step {manifest['step']}" in final.out
    one, other = (torch.load(path / "model.pt", weights_only=True) for path in (tmp_path / "whole", run))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []

    again = start(run, ranks=1)
    assert again.code == 0
    assert "finished: nothing to do" in again.out
