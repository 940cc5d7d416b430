"""`hvdlocal finished`: the exit code says whether the run of a configuration is finished."""

import json

import pytest
import yaml

from hvdlocal.cli import main
from hvdlocal.training import attempts


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """The command, with a configuration whose run has begun."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (tmp_path / "run.yaml").write_text(
        f"data: {{path: {tmp_path}}}\nmodel: {{name: digits_cnn}}\noutput: {tmp_path}/out\n"
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text(yaml.safe_dump({"epochs": 3}))
    return ["finished", str(tmp_path / "run.yaml"), "--epochs", "3"]


def test_one_that_has_begun(arguments, tmp_path, capsys):
    assert main(arguments) == 1
    assert capsys.readouterr().out == f"the run in {tmp_path}/out is not finished\n"


def test_one_that_has_not_begun(arguments, tmp_path):
    (tmp_path / "out" / "config.yaml").unlink()
    (tmp_path / "out").rmdir()
    assert main(arguments) == 1


def test_one_that_is_finished(arguments, tmp_path, capsys):
    (tmp_path / "out" / "summary.json").write_text("{}")
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"the run in {tmp_path}/out is finished\n"


def test_another_run_is_not_taken_for_this_one(arguments, tmp_path, capsys):
    (tmp_path / "out" / "summary.json").write_text("{}")
    assert main([*arguments, "--epochs", "4"]) == 2
    assert "an earlier run with epochs=3, not 4" in capsys.readouterr().err


@pytest.mark.parametrize(("job", "code"), [("7", 0), ("8", 1)])
def test_a_run_that_is_to_be_replaced_is_finished_only_by_this_job(arguments, tmp_path, monkeypatch, job, code):
    (tmp_path / "out" / "summary.json").write_text("{}")
    (tmp_path / "out" / attempts.ATTEMPTS).write_text(json.dumps({"job": "7"}) + "\n")
    monkeypatch.setenv("SLURM_JOB_ID", job)
    assert main([*arguments, "--overwrite", "true"]) == code
