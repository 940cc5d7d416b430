"""Runs whose ranks form islands: a rank dies inside a round, and other ranks or islands go on with the average."""

from __future__ import annotations

import json
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.faults import assert_the_same
from support.launch import MPIRUN, ROOT, Result, launch
from support.records import records

pytestmark = pytest.mark.timeout(900)  # a test starts several jobs, each with a deadline of its own

LONG_ROUNDS = ("--method.period.period", "50")
ISLANDS = ("--method.island", "2")


@pytest.mark.parametrize("backend", ["mpi4py", "horovod"])
def test_ranks_die_inside_a_round(make, undisturbed, backend):
    run = make(*LONG_ROUNDS, *ISLANDS, ranks=4)
    for fault in ("kill:computing:3:23", "kill:checkpointing:2:3", "kill:averaging:1:1"):
        result = run.start(fault, HVDLOCAL_BACKEND=backend)
        assert result.code not in (0, 2, 85), result.err
        step = run.checkpoints[-1]
        manifest = json.loads((run.output / f"checkpoints/step-{step:010}/manifest.json").read_text())
        assert (manifest["in_sync"], manifest["num_workers"], manifest["islands"]) == (False, 4, [[0, 1], [2, 3]])
    assert run.start(HVDLOCAL_BACKEND=backend).code == 0
    assert_the_same(run, undisturbed(*LONG_ROUNDS, *ISLANDS, ranks=4))


LAYOUTS = [None, (4, 2), (4, 4), (4, 1), (2, 2), (4, 2)]
"""Ranks, and ranks of an island."""


def test_other_islands(make):
    """Each start goes on with the average of the last, and with the images that are next."""
    run = make(*LONG_ROUNDS, ranks=4)
    samples = [0]
    for before, layout in pairwise(LAYOUTS):
        ranks, size = layout
        run.ranks, run.arguments = ranks, (*LONG_ROUNDS, "--method.island", str(size))
        is_last = before == (2, 2)
        result = run.start(*([] if is_last else ["usr2:computing:0:3"]))
        assert result.code == (0 if is_last else 85), result.err
        if before is not None:
            wrote = f"{before[0]} ranks" + (f" in islands of {before[1]}" if before[1] > 1 else "")
            assert f", averaged over the {wrote} that wrote it" in result.out
        steps = records(run.output, "steps")
        assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
        samples += [samples[-1] + ranks * 8 * i for i in range(1, len(steps) + 2 - len(samples))]
        assert [record["data_epoch"] * 96 for record in steps] == pytest.approx(samples[1:])
    end = records(run.output)[-1]
    assert (end["ranks"], end["island_size"], end["num_workers"]) == (4, 2, 2)
    assert end["evaluation"]["accuracy"] > 0.9


def own_loop(output: Path, *faults: str, ranks: int = 4) -> Result:
    script = [str(ROOT / "examples" / "own_loop.py"), str(output)]
    faulty = [sys.executable, str(ROOT / "tests/launch/faulty.py")]
    engine = {"HVDLOCAL_BACKEND": "mpi4py", "HVDLOCAL_ISLAND": "2"}
    return launch(*MPIRUN, "-np", str(ranks), *faulty, *faults, *script, timeout=150, **engine)


def test_a_loop_of_ones_own(tmp_path):
    assert own_loop(tmp_path / "whole").code == 0
    run = tmp_path / "run"
    assert own_loop(run, "kill:stepping:3:43").code not in (0, 2, 3, 85)
    one_island = own_loop(Path(shutil.copytree(run, tmp_path / "one island", symlinks=True)), ranks=2)
    assert one_island.code == 0, one_island.err
    assert ", averaged over the 4 ranks in islands of 2 that wrote it" in one_island.out
    final = own_loop(run)
    assert final.code == 0, final.err
    assert re.search(r"continuing from the checkpoint of step [24]0\n", final.out), "that of each rank itself"
    one, other = (torch.load(path / "model.pt", weights_only=True) for path in (tmp_path / "whole", run))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
