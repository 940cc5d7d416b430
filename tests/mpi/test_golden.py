"""The run of tests/golden/v1, which d8a0cb7 left inside a round of two ranks, is continued to its end on any number of ranks."""

import json
import shutil
import tempfile
from pathlib import Path

import golden
import pytest
import torch
from golden.v1.make import build
from support.records import records

from hvdlocal.cli.configuration import parse
from hvdlocal.models import MODELS
from hvdlocal.training import Trainer

V1 = Path(golden.__file__).parent / "v1"
EXPECTED = json.loads((V1 / "values.json").read_text())["summary"]
CHECKPOINT_STEP = 8


@pytest.fixture
def output(comm):
    """A copy of the run that all ranks share."""
    place = Path(comm.gather(tempfile.mkdtemp() if comm.rank == 0 else "", "test.place")[0])
    if comm.rank == 0:
        shutil.copytree(V1 / "run", place / "run")
    comm.barrier("test.copied")
    yield place / "run"
    comm.barrier("test.end")
    if comm.rank == 0:
        shutil.rmtree(place)


def test_an_old_run_is_continued(comm, output, monkeypatch):
    monkeypatch.setitem(MODELS, "golden", build)
    config = parse([str(V1 / "run.yaml"), f"--data.path={V1 / 'data/images'}", f"--output={output}"])
    summary = Trainer(config, comm).run()
    comm.barrier("test.trained")

    before = [record for record in records(V1 / "run") if record["step"] <= CHECKPOINT_STEP]
    after = records(output)
    assert after[: len(before)] == before
    assert after[len(before)]["step"] > CHECKPOINT_STEP, "it was continued, not begun anew"
    assert summary.evaluation.samples == EXPECTED["evaluation"]["samples"]
    assert summary.evaluation.accuracy > 0.9
    assert summary.progress >= 6 * 48 / 3 - 1  # the budget of six epochs
    assert torch.load(output / "model.pt", weights_only=True).keys() == build(3, (6, 6, 1)).state_dict().keys()
    if comm.size == 2:  # the same bits on the same machine; other machines round differently
        ended = json.loads((output / "summary.json").read_text())
        for name in ("steps", "rounds", "micro_batches", "collectives", "bytes_sent", "data_parallel_bytes"):
            assert ended[name] == EXPECTED[name], name
        assert ended["progress"] == pytest.approx(EXPECTED["progress"], rel=1e-3)
        assert ended["evaluation"]["loss"] == pytest.approx(EXPECTED["evaluation"]["loss"], rel=0.02)
