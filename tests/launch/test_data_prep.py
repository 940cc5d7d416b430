"""data_prep under mpirun: the same files for any number of ranks, one sentence for what goes wrong, and kill -9."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.launch import MPIRUN, ROOT, environment, launch, mpirun

PREP = [sys.executable, "-m", "data_prep"]
DEADLINE_SECONDS = 60


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["images", "jpeg"])
def test_the_files_are_the_same_for_any_number_of_ranks(tmp_path, kind):
    options = ["synthetic", "--samples", "500", "--size", "16", "--shards", "5", "--seed", "3", "--verify"]
    if kind == "jpeg":
        pytest.importorskip("simplejpeg")
        options.append("--jpeg")
    assert launch(*PREP, *options, "--output", str(tmp_path / "alone")).code == 0
    expected = content(tmp_path / "alone")
    assert len(expected) == 12
    for ranks in (1, 2, 3):
        result = mpirun(ranks, *PREP, *options, "--output", str(tmp_path / str(ranks)))
        assert result.code == 0, result.err
        assert content(tmp_path / str(ranks)) == expected
        assert result.out.count("train: 500 samples, all checksums agree") == 1, "rank 0 speaks for all"


def test_bad_files_are_told_once_and_left_out_alike(tmp_path):
    simplejpeg = pytest.importorskip("simplejpeg")
    np = pytest.importorskip("numpy")
    for name in ("a", "b"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.full((20 + i, 30, 3), 20 * i, np.uint8)
            (tmp_path / "tree" / name / f"{i}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels))
    (tmp_path / "tree" / "b" / "7.jpg").write_bytes(b"no picture")
    arguments = ["imagenet", "--source", str(tmp_path / "tree"), "--shards", "4", "--output"]
    result = mpirun(3, *PREP, *arguments, str(tmp_path / "three"))
    assert result.code == 2
    assert result.err.count("1 of 20 samples cannot be used (b/7.jpg is not an image of a known format)") == 1
    assert "Traceback" not in result.err
    assert mpirun(2, *PREP, *arguments, str(tmp_path / "three"), "--bad", "skip").code == 0
    assert launch(*PREP, *arguments, str(tmp_path / "one"), "--bad", "skip").code == 0
    assert content(tmp_path / "three") == content(tmp_path / "one")


def test_a_tree_of_pixels_is_the_same_for_any_number_of_ranks(tmp_path):
    np, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    for i in range(90):
        file = tmp_path / "tree" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(np.full((6, 5), i, np.uint8)).save(file)
    arguments = [*PREP, "folder", "--source", str(tmp_path / "tree"), "--shards", "4", "--output"]
    assert launch(*arguments, str(tmp_path / "one")).code == 0
    result = mpirun(3, *arguments, str(tmp_path / "three"))
    assert result.code == 0, result.err
    assert result.err.count("stored as pixels, 5x6 pixels, gray") == 1
    assert content(tmp_path / "three") == content(tmp_path / "one")
    (tmp_path / "tree" / "a" / "8.png").write_bytes(b"no picture")
    result = mpirun(3, *arguments, str(tmp_path / "bad"))
    assert result.code == 2
    assert (
        result.err.count("1 of the files cannot be stored as pixels (a/8.png is not an image of a known format)") == 1
    )


def test_a_text_is_the_same_for_any_number_of_ranks(tmp_path):
    """Of several pieces, over two files, by a tokenizer whose tokens are those of the bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(150_000)))
    (tmp_path / "b.txt").write_text("".join(f"Zeile {i}\n" for i in range(50_000)))
    source = ["--source", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    for kind in ("bytes", str(tmp_path / "tokenizer.json")):
        arguments = [*PREP, "text", *source, "--tokenizer", kind, "--shards", "3", "--output"]
        outputs = [tmp_path / f"{Path(kind).stem}_{ranks}" for ranks in (1, 3)]
        assert launch(*arguments, str(outputs[0])).code == 0
        result = mpirun(3, *arguments, str(outputs[1]))
        assert result.code == 0, result.err
        assert content(outputs[0]) == content(outputs[1])
    (tmp_path / "b.txt").write_bytes(b"good\n" * 300_000 + b"\xff")
    result = mpirun(3, *arguments, str(tmp_path / "bad"))
    assert result.code == 2
    assert result.err.count("b.txt is not UTF-8 at byte 1500000 (0xff)") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imagenet", "--source", "/nowhere", "--output", "/nowhere"], "/nowhere is not a directory"),
        (["synthetic", "--samples", "30", "--shards", "40", "--output", "/nowhere"], "30 images cannot fill 40 shards"),
        (["digits"], "the following arguments are required: --output"),
        (["verify", "/nowhere"], "/nowhere holds no finished data set"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(arguments, message):
    result = mpirun(2, *PREP, *arguments, timeout=60)
    assert result.code == 2
    assert result.err.count(message) == 1
    assert "Traceback" not in result.err


def test_a_failure_on_one_rank_ends_all(tmp_path):
    """Rank 1 alone cannot read its part."""
    script = """
import sys
import numpy as np
from hvdlocal.communicator import init
from hvdlocal.data import ShardWriter

communicator = init("mpi4py")

class Images(np.ndarray):
    def __getitem__(self, rows):
        if communicator.rank == 1:
            raise OSError("rank 1 cannot read this")
        return super().__getitem__(rows)

images = np.zeros((100, 4, 4, 3), np.uint8).view(Images)
writer = ShardWriter(sys.argv[1], "train", classes=["a"], num_shards=4, communicator=communicator)
try:
    writer.write(images, np.zeros(100, int), identity="i")
except ValueError as error:
    print(f"{communicator.rank}: {error}\\n", end="", flush=True)  # one write, also where nothing is buffered
    communicator.barrier("end")
"""
    result = mpirun(3, sys.executable, "-c", script, str(tmp_path))
    assert result.code == 0, result.err
    said = sorted(line for line in result.out.splitlines() if line)
    assert said == [f"{rank}: rank 1 cannot read this (rank 1 of 3)" for rank in range(3)]


def test_a_rank_that_does_not_come_is_not_waited_for(tmp_path):
    script = """
import sys, time
from data_prep import __main__, synthetic
from hvdlocal.communicator import init

if init("mpi4py").rank == 1:
    synthetic.load = lambda *_: time.sleep(100)
sys.exit(__main__.main(["synthetic", "--output", sys.argv[1]]))
"""
    result = mpirun(2, sys.executable, "-c", script, str(tmp_path), HVDLOCAL_TIMEOUT_SECONDS="3")
    assert result.code == 4
    assert "data_prep: rank 0 of 2 " in result.err
    assert "'data.source'" in result.err
    assert "Traceback" not in result.err
    assert result.seconds < 60


def processes_of(mark: str) -> list[int]:
    """Processes whose command line holds the mark, a path of this test alone."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("finished", [1, 9])
def test_kill_and_run_again(tmp_path, finished):
    options = ["synthetic", "--samples", "12000", "--size", "24", "--shards", "24"]
    output = tmp_path / "killed"
    process = subprocess.Popen(
        [*MPIRUN, "-np", "2", *PREP, *options, "--output", str(output)],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    unfinished = output / "train" / ".unfinished"
    deadline = time.monotonic() + DEADLINE_SECONDS
    while len(list(unfinished.glob("*.h5.json"))) < finished:
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    for pid in processes_of(str(output)):
        os.kill(pid, signal.SIGKILL)
    process.wait(DEADLINE_SECONDS)
    while processes_of(str(output)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not (output / "train" / "manifest.json").exists()
    kept = {
        path: path.stat().st_ino for path in unfinished.glob("*.h5") if path.with_name(f"{path.name}.json").exists()
    }
    assert len(kept) >= finished

    result = mpirun(3, *PREP, *options, "--output", str(output))
    assert result.code == 0, result.err
    assert launch(*PREP, *options, "--output", str(tmp_path / "whole")).code == 0
    assert content(output) == content(tmp_path / "whole")
    assert all((output / "train" / path.name).stat().st_ino == inode for path, inode in kept.items())
