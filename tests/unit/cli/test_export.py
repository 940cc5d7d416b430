"""`hvdlocal export` of what is not an unfinished run."""

import pytest

from hvdlocal.cli import main


@pytest.mark.parametrize("left", [False, True], ids=["without checkpoints", "with a checkpoint"])
def test_a_finished_run_names_its_model(tmp_path, capsys, left):
    """Also if it has left a checkpoint, which is older."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step-0000000004").mkdir(parents=True)
    if left:
        (run / "checkpoints" / "step-0000000004" / "manifest.json").write_text("{}")
    (run / "summary.json").write_text("{}")
    assert main(["export", str(run), "--output", f"{tmp_path}/model.pt"]) == 2
    assert capsys.readouterr().err == f"hvdlocal: the run in {run} is finished: its model is {run}/model.pt\n"
    assert not (tmp_path / "model.pt").exists()
