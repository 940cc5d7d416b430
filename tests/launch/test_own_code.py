"""A user's code that fails in the middle of training: one sentence, no requeue, and nothing hangs."""

import pytest
from support.configs import write_config
from support.datasets import write_three_classes
from support.launch import HVDLOCAL, ROOT, mpirun


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("raises", "KeyError: 'later' (in "),
        ("leaves", "it left the program by sys.exit: with code 0 (in "),
        ("nothing", "loss() must return (loss, output), not NoneType"),
    ],
)
def test_a_task_that_fails_later(tmp_path, how, sentence):
    write_three_classes(tmp_path / "data")
    task = {"task": "support.own_code:Later", "task_arguments": {"how": how}, "model": {"name": "support.models:Slope"}}
    config = write_config(tmp_path / "run.yaml", tmp_path / "data", tmp_path / "out", **task)
    result = mpirun(2, *HVDLOCAL, "train", str(config), PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert result.code == 2, result.err
    assert "hvdlocal (rank 1): rank 1 " in result.err
    assert f"task=support.own_code:Later with model.name=support.models:Slope: {sentence}" in result.err
    assert "Traceback" not in result.err
