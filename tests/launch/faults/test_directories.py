"""Two runs in one directory, and directories that are moved, removed or replaced."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace

import pytest
from support.faults import assert_the_same

pytestmark = pytest.mark.timeout(900)  # a test starts several jobs, each with a deadline of its own


def test_two_runs_in_one_directory(make, undisturbed, tmp_path):
    first, go = make(ranks=0), tmp_path / "go"
    with first.started(f"wait={go}:computing:0:7") as process:
        second = replace(first, ranks=2).start()
        assert second.code == 2, second.err
        assert second.err.count(f"is in use by another run (process {process.pid} on ") == 2, "on every rank"
        go.touch()
        assert process.wait() == 0
    assert_the_same(first, undisturbed(ranks=0))


FATES = ("moved", "removed", "replaced by another run")


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_directory_that_is_not_there_any_more(make, undisturbed, tmp_path, ranks):
    """The run ends with an error, and writes nothing into what has taken its place."""
    for fate in FATES:
        run, go = make(ranks=ranks), tmp_path / fate
        with run.started(f"wait={go}:computing:0:7") as process:
            if fate == "moved":
                run.output.rename(run.output.with_name("elsewhere"))
            else:
                while run.output.exists():  # a checkpoint may be under way
                    shutil.rmtree(run.output, ignore_errors=True)
            other = replace(run, ranks=0)
            if fate == "replaced by another run":
                assert other.start("kill:computing:0:30").code == -signal.SIGKILL
                before = {path: path.read_bytes() for path in run.output.rglob("*") if path.is_file()}
            go.touch()
            said = process.stderr.read()
            assert process.wait() == 1, said
            assert f"the directory {run.output} was moved or removed, or replaced by another one. Move it back" in said
            assert "Traceback" not in said
        if fate == "replaced by another run":
            assert {path: path.read_bytes() for path in run.output.rglob("*") if path.is_file()} == before
            assert other.start().code == 0
            assert_the_same(other, undisturbed(ranks=0))
        else:
            assert not run.output.exists()
            if fate == "moved":
                run.output.with_name("elsewhere").rename(run.output)
                assert run.start().code == 0
                assert_the_same(run, undisturbed(ranks=ranks))


def test_a_directory_that_is_moved_at_the_end(make, undisturbed, tmp_path):
    """What was trained is kept, where the directory is now; but the run does not say that it is where it was."""
    run, go = make(ranks=0), tmp_path / "go"
    with run.started(f"wait={go}:ending:0:1") as process:
        elsewhere = run.output.rename(run.output.with_name("elsewhere"))
        go.touch()
        said = process.stderr.read()
        assert process.wait() == 1, said
        assert f"the directory {run.output} was moved or removed" in said
    assert not run.output.exists()
    assert_the_same(replace(run, output=elsewhere), undisturbed(ranks=0))


def test_an_overwriting_run_does_not_follow_links(make, tmp_path):
    precious = tmp_path / "precious"
    (precious / "step-0000000001").mkdir(parents=True)
    (precious / "file").write_text("precious")
    for name in ("checkpoints", ".lock"):
        run = make("--overwrite", "true", ranks=0)
        run.output.mkdir()
        (run.output / name).symlink_to(precious if name == "checkpoints" else precious / "file")
        result = run.start()
        assert result.code == 2, result.err
        assert f"{run.output}/{name}: a symbolic link, which hvdlocal does not follow here: remove it" in result.err
        assert (precious / "file").read_text() == "precious"
        assert (precious / "step-0000000001").is_dir()
