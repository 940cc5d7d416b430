"""docs/mistakes.md says what is said: every mistake of its tables is made, and the answer compared."""

import re
import shutil
from collections.abc import Callable
from itertools import dropwhile, takewhile
from pathlib import Path

import h5py
import numpy as np
import pytest

import hvdlocal
from data_prep.__main__ import main as data_prep
from hvdlocal.cli import main
from hvdlocal.communicator import SingleProcess
from hvdlocal.training.output_directory import lock

GOOD = "data: {path: data, batch_size: 8}\nmodel: {name: digits_cnn}\noutput: out\n"
SHARD, MANIFEST = Path("data/train/train-00000-of-00001.h5"), Path("data/train/manifest.json")


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, each a list of its cells."""
    document = (Path(__file__).parents[3] / "docs" / "mistakes.md").read_text(encoding="utf-8")
    below = document.split(f"## {heading}\n", 1)[1].splitlines()
    lines = takewhile(lambda line: line.startswith("|"), dropwhile(lambda line: not line.startswith("|"), below))
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    assert len(rows) > 3
    return rows[2:]  # behind the head and the line below it


def check(said: str, promised: str) -> None:
    assert said.startswith("hvdlocal: ")
    assert said.count("\n") == 1
    assert re.search(".*".join(map(re.escape, promised.strip("`").split("…"))), said), said


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A directory with a small data set and a configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hvdlocal.communicator.launch._current", SingleProcess())
    monkeypatch.setattr("hvdlocal.training.output_directory.PATIENCE_SECONDS", 0.1)
    write("train", 24)
    write("test", 9)
    Path("run.yaml").write_text(GOOD)


def write(split: str, count: int, where: str = "data", classes: tuple[str, ...] = ("a", "b"), seed: int = 0) -> None:
    images = np.random.default_rng(seed).integers(0, 255, (count, 8, 8, 1), dtype=np.uint8)
    hvdlocal.ShardWriter(where, split, classes=list(classes)).write(images, np.arange(count) % 2)


@pytest.mark.parametrize("row", table("Settings"), ids=lambda row: row[0])
def test_settings(capsys, row):
    assert main(["train", "run.yaml", *row[0].strip("`").split()]) == 2
    check(capsys.readouterr().err, row[1])
    assert not Path("out/metrics.jsonl").exists()


@pytest.mark.parametrize("row", table("The file"), ids=lambda row: row[0])
def test_the_file(capsys, row):
    contents = {
        "an empty file": b"",
        "bytes that are not UTF-8": b"seed: \xff",
        "no configuration at all: 1 MB of it": bytes(10**6),
    }
    written = row[0].strip("`").replace("⏎", "\n").replace("⇥", "\t")
    Path("run.yaml").write_bytes(contents.get(row[0], written.encode()))
    assert main(["train", "run.yaml"]) == 2
    check(capsys.readouterr().err, row[1])


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def change_an_image() -> None:
    with h5py.File(SHARD) as file:
        place = file["images"].id.get_offset() + 70
    flip(SHARD, place)


def put_the_shard_of_another_preparation() -> None:
    write("train", 24, "other", seed=1)
    shutil.copy(Path("other", *SHARD.parts[1:]), SHARD)


def write_a_test_split_of_other_classes() -> None:
    shutil.rmtree("data/test")
    write("test", 9, classes=("a", "c"))


ACCIDENTS: dict[str, Callable[[], object]] = {
    "preparing was interrupted": MANIFEST.unlink,
    "a shard is missing": SHARD.unlink,
    "a shard was cut off": lambda: SHARD.write_bytes(SHARD.read_bytes()[:-100]),
    "a bit of an image changed": change_an_image,
    "the head of a shard changed": lambda: flip(SHARD, 2),
    "a shard of another split": lambda: shutil.copy("data/test/test-00000-of-00001.h5", SHARD),
    "a shard of another preparation": put_the_shard_of_another_preparation,
    "the manifest was edited": lambda: MANIFEST.write_text(MANIFEST.read_text().replace('"seed": 0', '"seed": 1')),
    "the manifest was cut off": lambda: MANIFEST.write_text(MANIFEST.read_text()[:200]),
    "training and test images of two data sets": write_a_test_split_of_other_classes,
    "`python -m data_prep verify data` of a damaged one": change_an_image,
}


@pytest.mark.parametrize("row", table("The data set"), ids=lambda row: row[0])
def test_the_data_set(capsys, row):
    ACCIDENTS[row[0]]()
    if "verify" in row[0]:
        assert data_prep(["verify", "data"]) == 2
        assert "is damaged in samples 0..23" in capsys.readouterr().err
    else:
        assert main(["train", "run.yaml"]) == 2
        check(capsys.readouterr().err, row[1])


NEWEST = Path("out/checkpoints/step-0000000008")


def prepare_other_images() -> None:
    shutil.rmtree("data/train")
    write("train", 24, seed=1)


def damage_all() -> None:
    for path in Path("out/checkpoints").glob("step-*"):
        flip(path / "rank-00000.pt", 1000)


CHECKPOINT_ACCIDENTS: dict[str, Callable[[], object]] = {
    "the data were prepared anew, with other images": prepare_other_images,
    "a bit of the newest changed": lambda: flip(NEWEST / "rank-00000.pt", 1000),
    "the newest was cut off": lambda: (NEWEST / "rank-00000.pt").write_bytes(bytes(100)),
    "its manifest was edited": lambda: (NEWEST / "manifest.json").write_text('{"step": 9}'),
    "a file of it is missing": lambda: (NEWEST / "rank-00000.pt").unlink(),
    "every one is damaged": damage_all,
    "`config.yaml` is missing": lambda: Path("out/config.yaml").unlink(),
    "another run uses the directory": lambda: lock(Path("out")),
}


@pytest.mark.parametrize("row", table("Checkpoints"), ids=lambda row: row[0])
def test_checkpoints(capsys, row):
    command = ["train", "run.yaml", "--epochs", "3", "--checkpoint.every_steps", "2"]
    assert main(command) == 0
    if "finished" not in row[0]:
        Path("out/summary.json").unlink()  # as if it had been killed in its last moments
    capsys.readouterr()
    holds = CHECKPOINT_ACCIDENTS.get(row[0], lambda: None)()  # kept, as one of them is a lock
    more = row[0].split("`")[1].split() if row[0].startswith("`--") else []
    assert main(command + more) == int(row[2])
    said = capsys.readouterr()
    check(said.err or "hvdlocal: " + said.out, row[1])
    del holds


@pytest.mark.parametrize("row", table("The environment"), ids=lambda row: row[0])
def test_the_environment(capsys, monkeypatch, row):
    words = row[0].split("`")[1]
    if words.startswith("HVDLOCAL_"):
        monkeypatch.setenv(*words.split("="))
        monkeypatch.setattr("hvdlocal.communicator.launch._current", None)
    elif "cuda" in words:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = words.split()[1:] if words.startswith("hvdlocal ") else ["train", "run.yaml"]
    assert main(arguments + (words.split() if words.startswith("--") else [])) == int(row[2])
    check(capsys.readouterr().err, row[1])
