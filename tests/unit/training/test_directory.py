"""Files that are whole or not there, directories that are themselves, and links that nobody follows."""

import errno
import os
import resource
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from hvdlocal import ShardWriter
from hvdlocal.data.write.staging import LOCK
from hvdlocal.directory import Directory, LinkError, MovedError, replacing, user_file, write_text
from hvdlocal.lock import hold
from hvdlocal.training import output_directory, run_files
from hvdlocal.training.attempts import note_attempt
from hvdlocal.training.checkpoint import files
from hvdlocal.training.config import DataConfig, ModelConfig, TrainConfig
from hvdlocal.training.metrics import JsonLines
from hvdlocal.training.saved_model import BestModel, save_state

STATE = {"model": {"w": torch.zeros(1000)}}


@contextmanager
def no_room_to_write(monkeypatch):
    """The operating system refuses every byte after the fiftieth of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def failing(monkeypatch, name):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        yield


FAILURES = {
    "write": no_room_to_write,
    "fsync": lambda monkeypatch: failing(monkeypatch, "fsync"),
    "rename": lambda monkeypatch: failing(monkeypatch, "rename"),
}


def checkpoint(path: Path) -> None:
    with Directory(path) as root:
        written = [files.write_rank(root, 7, 0, STATE)]
        files.complete(root, 7, {"num_workers": 1, "in_sync": True}, written)


def named_by_a_user(path: Path) -> None:
    with user_file(path / "file") as file:
        file.write(bytes(1000))


def figure(path: Path) -> None:
    from hvdlocal.figures.style import new_figure, save

    save(new_figure(1, 1)[0], path / "figure.svg")


def described(path: Path) -> None:
    config = TrainConfig(DataConfig("data"), ModelConfig("digits_cnn"), "out")
    run_files.describe(Directory(path), asdict(config), {"ranks": 2})


WRITERS = {
    "text": lambda path: write_text(path / "file", "x" * 1000),
    "user's file": named_by_a_user,
    "config.yaml": described,
    "attempts.jsonl": lambda path: [note_attempt(Directory(path), step, 2) for step in (0, 5)],
    "model.pt": lambda path: save_state(STATE["model"], Directory(path), "model.pt"),
    "rank file": lambda path: files.write_rank(Directory(path), 7, 0, STATE),
    "figure": figure,
}


def leftovers(path: Path) -> list[str]:
    return [str(found) for found in path.rglob("*") if found.is_file()]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("failure", FAILURES)
def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch, writer, failure):
    if (writer, failure) == ("rank file", "rename"):
        pytest.skip("a rank's file bears its name from the beginning; its directory does not")
    WRITERS[writer](tmp_path)  # a lazy import inside must not meet the failure
    for found in tmp_path.iterdir():
        shutil.rmtree(found) if found.is_dir() else found.unlink()
    with FAILURES[failure](monkeypatch), pytest.raises(OSError, match=str(tmp_path)):
        WRITERS[writer](tmp_path)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("failure", FAILURES)
def test_what_was_there_stays_when_its_successor_cannot_be_written(tmp_path, monkeypatch, failure):
    path = tmp_path / "file"
    write_text(path, "before")
    with FAILURES[failure](monkeypatch), pytest.raises(OSError, match=str(path)):
        write_text(path, "x" * 1000)
    assert path.read_text() == "before"
    assert leftovers(tmp_path) == [str(path)]
    with pytest.raises(KeyError), replacing(path):
        raise KeyError
    assert leftovers(tmp_path) == [str(path)], "whatever the error is"


@pytest.mark.parametrize("failure", FAILURES)
def test_a_data_set_that_cannot_be_written_leaves_no_half_file(tmp_path, monkeypatch, failure):
    images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.arange(4) % 2
    writer = ShardWriter(tmp_path, "train", classes=["a", "b"])
    with FAILURES[failure](monkeypatch), pytest.raises(OSError, match=r"."):
        writer.write(images, labels)
    assert [name for name in leftovers(tmp_path) if name.endswith(".tmp")] == []
    assert not (tmp_path / "train" / "manifest.json").exists()
    assert not (tmp_path / "train" / LOCK).exists()


def test_a_manifest_that_cannot_be_completed_is_no_checkpoint(tmp_path, monkeypatch):
    with failing(monkeypatch, "rename"), pytest.raises(OSError, match=str(tmp_path)):
        checkpoint(tmp_path)
    assert files.newest_first(tmp_path) == []
    assert not list(tmp_path.rglob("manifest.json*"))


def test_the_best_model_is_written_later_when_there_was_no_room(tmp_path, monkeypatch):
    best = BestModel(Directory(tmp_path), "best.pt")
    best.write()
    assert leftovers(tmp_path) == [], "there is none yet"
    best.take({"w": torch.ones(3)})
    with failing(monkeypatch, "fsync"), pytest.raises(OSError, match=r"best\.pt"):
        best.write()
    best.write()
    assert torch.load(tmp_path / "best.pt", weights_only=True)["w"].tolist() == [1, 1, 1]
    (tmp_path / "best.pt").unlink()
    best.write()
    assert leftovers(tmp_path) == [], "once is enough"


# -- records ------------------------------------------------------------------------------------------------------------


def test_records_wait_for_room_that_comes_back(tmp_path, monkeypatch):
    """They are in the file in order, and none is lost or torn."""
    taken = [True]
    records = JsonLines(Directory(tmp_path), 0, lambda: taken[0])
    with no_room_to_write(monkeypatch):
        monkeypatch.setattr("hvdlocal.training.metrics.NO_ROOM", (errno.EFBIG,))
        for step in range(10):
            records.write("steps", step)
            records.flush()
        assert (tmp_path / "metrics.jsonl").stat().st_size == 50
        taken[0] = False
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            records.flush()
    assert records.position() == (tmp_path / "metrics.jsonl").stat().st_size
    records.close()
    records.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == [f'{{"kind": "steps", "step": {step}}}' for step in range(10)]


def test_the_end_of_the_records_does_not_wait(tmp_path, monkeypatch):
    records = JsonLines(Directory(tmp_path), 0, lambda: True)
    records.write("steps", 1, text="x" * 200)
    monkeypatch.setattr("hvdlocal.training.metrics.NO_ROOM", (errno.EFBIG,))
    with no_room_to_write(monkeypatch), pytest.raises(OSError, match=r"metrics\.jsonl"):
        records.close()
    records.close()


# -- identity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fate", ["moved", "removed", "replaced", "parent moved", "a file now"])
def test_a_directory_that_is_not_there_any_more(tmp_path, fate):
    path = tmp_path / "runs" / "a"
    path.mkdir(parents=True)
    held = Directory(path)
    held.check()
    if fate == "parent moved":
        path.parent.rename(tmp_path / "elsewhere")
    elif fate == "removed":
        path.rmdir()
    else:
        path.rename(tmp_path / "elsewhere")
    if fate == "replaced":
        path.mkdir()
    elif fate == "a file now":
        path.touch()
    with pytest.raises(MovedError, match=f"{path} was moved or removed"):
        held.check()
    if fate == "removed":
        with pytest.raises(FileNotFoundError, match=f"{path}/file"):
            held.write_text("file", "ours")
    else:
        held.write_text("file", "ours")
    assert not (path / "file").exists(), "never into what has taken its place"


def test_a_link_to_the_directory_itself_is_the_users(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to("scratch")
    held = Directory(tmp_path / "out")
    held.write_text("file", "x")
    held.check()
    assert (tmp_path / "scratch" / "file").read_text() == "x"
    (tmp_path / "out").unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "out").symlink_to("other")
    with pytest.raises(MovedError):
        held.check()


# -- links --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path):
    """A directory of somebody else's, which must stay as it is."""
    directory = tmp_path / "victim"
    (directory / "step-0000000007.tmp").mkdir(parents=True)
    for name in ("file", "step-0000000007.tmp/rank-00000.pt"):
        (directory / name).write_text("precious")
    before = {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
    yield directory
    assert {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize("name", ["model.pt.tmp", "config.yaml.tmp", "environment.json.tmp", "attempts.jsonl.tmp"])
def test_temporaries_that_are_links(tmp_path, victim, name):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(victim / "file")
    described(run)
    note_attempt(Directory(run), 0, 1)
    save_state(STATE["model"], Directory(run), "model.pt")
    assert sorted(path.name for path in run.iterdir() if path.is_symlink()) == []


@pytest.mark.parametrize("kind", ["symbolic", "hard", "dangling", "fifo"])
@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
def test_files_that_are_opened_and_are_not_ours(tmp_path, victim, name, kind):
    run = tmp_path / "run"
    run.mkdir()
    if kind == "symbolic":
        (run / name).symlink_to(victim / "file")
    elif kind == "hard":
        (run / name).hardlink_to(victim / "file")
    elif kind == "dangling":
        (run / name).symlink_to(victim / "new")
    else:
        os.mkfifo(run / name)
    if name == ".lock":
        with pytest.raises(ValueError, match=rf"{run} cannot be used \({run}/\.lock: .*remove it\)"):
            output_directory.lock(run)
    else:
        with pytest.raises(LinkError, match=rf"remove it: '{run}/metrics\.jsonl'"):
            JsonLines(Directory(run))


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_directories_that_are_links(tmp_path, victim, name):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(victim)
    with pytest.raises(ValueError, match=f"{run}/{name}: a symbolic link"):
        output_directory.lock(run)
    run_files.clear(Directory(run))  # as --overwrite does
    assert not (run / name).exists()


def test_a_link_in_the_place_of_a_checkpoint(tmp_path, victim):
    run = tmp_path / "run"
    run.mkdir()
    (run / "step-0000000007.tmp").symlink_to(victim)
    with Directory(run) as root:
        with pytest.raises(LinkError, match="symbolic link"):
            files.write_rank(root, 7, 0, STATE)
        files.discard_incomplete(root)
        (run / "step-0000000007").symlink_to(victim)
        files.set_aside(root, 7)
        (run / "step-0000000007").symlink_to(victim)
        files.keep_newest(root, 0)
    (run / "deep").mkdir()
    (run / "deep" / "link").symlink_to(victim)
    Directory(run).clear()
    assert list(run.iterdir()) == []


def test_a_data_set_whose_files_are_links(tmp_path, victim):
    images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.arange(4) % 2
    split = tmp_path / "data" / "train"
    split.mkdir(parents=True)
    (split / LOCK).symlink_to(victim / "file")
    with pytest.raises(OSError, match="symbolic link"):
        ShardWriter(tmp_path / "data", "train", classes=["a", "b"]).write(images, labels)
    (split / LOCK).unlink()
    for name in ("manifest.json.tmp", "manifest.json"):
        (split / name).symlink_to(victim / "file")
    ShardWriter(tmp_path / "data", "train", classes=["a", "b"], overwrite=True).write(images, labels)
    assert not (split / "manifest.json").is_symlink()


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path):
    """The one that waited must not share the directory with one that comes later and finds no file."""
    directory = Directory(tmp_path)
    first = hold(directory, "lock", 0.0)
    waiting = directory.open_to_append("lock")
    (tmp_path / "lock").unlink()
    first.close()
    second = hold(directory, "lock", 0.0)
    assert os.fstat(second.fileno()).st_ino == (tmp_path / "lock").stat().st_ino
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on "):
        hold(directory, "lock", 0.0)
    waiting.close()
    second.close()
    hold(directory, "lock", 0.0).close()


# -- what a user names --------------------------------------------------------------------------------------------------


def test_a_users_file_may_be_a_link_a_pipe_or_a_device(tmp_path):
    target = tmp_path / "target"
    target.write_text("before")
    (tmp_path / "link").symlink_to("target")
    with user_file(tmp_path / "link") as file:
        file.write(b"after")
    assert (tmp_path / "link").is_symlink()
    assert target.read_text() == "after"
    with user_file(Path("/dev/null")) as file:
        file.write(b"nothing")
    assert not Path("/dev/null").is_file()
    read, write = os.pipe()
    with user_file(Path(f"/dev/fd/{write}")) as file:
        file.write(b"through")
    assert os.read(read, 100) == b"through"
    os.close(read)
    os.close(write)
    with pytest.raises(IsADirectoryError), user_file(tmp_path):
        pass
