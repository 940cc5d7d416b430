"""`hvdlocal.read_metrics` has every record of a run in a table of pandas."""

import json
import sys

import numpy as np
import pandas
import pytest
from recorded import write_run

import hvdlocal

RECORDS = [
    {
        "kind": "steps",
        "step": 3,
        "progress": 3.0,
        "epoch": 0.1,
        "data_epoch": 0.1,
        "elapsed_seconds": 1,
        "bytes_sent": 0,
    }
    | {"divergence": None, "perplexity": 9.0},
    {"kind": "evaluation", "step": 4, "progress": 4.0, "epoch": 0.2, "data_epoch": 0.2, "elapsed_seconds": 2}
    | {"loss": 0.5, "accuracy": 0.75, "bits_per_byte": 2.5},
    {
        "kind": "steps",
        "step": 6,
        "progress": 6.0,
        "epoch": 0.3,
        "data_epoch": 0.3,
        "elapsed_seconds": 3,
        "bytes_sent": 8,
    }
    | {"divergence": None, "perplexity": None},
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.mark.parametrize("place", ["directory", "file"])
def test_records_of_a_kind(path, place):
    table = hvdlocal.read_metrics(path if place == "file" else path.parent, "steps")
    assert table["step"].tolist() == [3, 6]
    assert table["bytes_sent"].tolist() == [0, 8]
    np.testing.assert_array_equal(table["perplexity"], [9, np.nan])
    assert table["divergence"].dtype == float  # null in every record
    assert "accuracy" not in table


def test_all_records(path):
    table = hvdlocal.read_metrics(str(path))
    assert table["kind"].tolist() == ["steps", "evaluation", "steps"]
    np.testing.assert_array_equal(table["bits_per_byte"], [np.nan, 2.5, np.nan])


def test_a_whole_run(tmp_path):
    run = write_run(tmp_path / "run")
    rounds = hvdlocal.read_metrics(run, "round").set_index("step")
    assert rounds.index.tolist() == list(range(4, 801, 4))
    assert rounds["bytes_sent"].diff().dropna().eq(1000).all()
    end = hvdlocal.read_metrics(run, "end")
    assert end["seconds.elapsed"].tolist() == [8]


def test_a_running_run(path):
    with path.open("a") as file:
        file.write('{"kind": "steps", "st')
    assert len(hvdlocal.read_metrics(path)) == 3
    assert isinstance(hvdlocal.read_metrics(path, "end"), pandas.DataFrame)
    assert hvdlocal.read_metrics(path, "end").empty


def test_mistakes(path, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no records of kind 'rounds': choose one of round, steps, evaluation, end"):
        hvdlocal.read_metrics(path, "rounds")
    with pytest.raises(ValueError, match="nowhere does not exist: give the output directory of hvdlocal train, or its"):
        hvdlocal.read_metrics(tmp_path / "nowhere")
    path.write_text('{"kind": \n' + path.read_text())
    with pytest.raises(ValueError, match="line 1 is damaged"):
        hvdlocal.read_metrics(path)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs pandas: pip install hvdlocal\[pandas\]"):
        hvdlocal.read_metrics(path)
