"""Damage anywhere in an HDF5 file: an error that names the file, or the very same samples; with a crash of HDF5 the worst.

HDF5's own library may crash on a damaged file, so all reading is done in a process of its own, which is started again
behind the damage that ended it.
"""

import json
import multiprocessing
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvdlocal.data import JpegShardWriter, ShardedDataset, ShardWriter, open_hdf5

CRASHES = (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGFPE)
N = 70
IMAGES = np.random.RandomState(0).randint(0, 256, (N, 4, 3, 2)).astype(np.uint8)
LABELS = np.arange(N) % 2


def damaged(raw: bytes, number: int) -> tuple[str, bytes]:
    """The damage of this number: its kind, and the file with it. All parts of the file are met."""
    random = np.random.RandomState(number)
    content = bytearray(raw)
    kind = ("bit", "byte", "zeros", "noise", "cut", "header", "moved")[number % 7]
    place = int(random.randint(len(raw)))
    length = int(random.randint(1, 600))
    if kind == "bit":
        content[place] ^= 1 << int(random.randint(8))
    elif kind == "byte":
        content[place] = int(random.randint(256))
    elif kind == "zeros":
        content[place : place + length] = bytes(len(content[place : place + length]))
    elif kind == "noise":
        content[place : place + length] = random.bytes(len(content[place : place + length]))
    elif kind == "cut":
        del content[place:]
    elif kind == "header":
        for near in random.randint(min(len(raw), 3000), size=4):
            content[near] ^= int(random.randint(1, 256))
    else:
        content[place : place + length] = raw[: len(content[place : place + length])]
    return kind, bytes(content)


def read_shards(path: Path) -> str:
    """What a data set of shards holds, as text; only errors that are promised get out as such."""
    with ShardedDataset(path.parent.parent, storage="ram") as dataset:
        dataset.verify()
        samples = [bytes(dataset.bytes_of(sample)).hex() for sample in range(len(dataset))]
        return json.dumps([samples, dataset.labels.tolist(), dataset.index.tolist()])


def read_foreign(path: Path) -> str:
    """The same of somebody else's file, which has no checksums: only the number of samples can be told."""
    with open_hdf5(path) as dataset:
        return str(len(dataset.take(np.arange(len(dataset)))))


def read_all(read, path: Path, raw: bytes, numbers: range, report: Path) -> None:
    """Reads every damaged file; one line each in `report`, in front of which its number stands before it is read."""
    as_written = read(path)
    with report.open("a") as said:
        for number in numbers:
            print(number, end=" ", file=said, flush=True)
            kind, content = damaged(raw, number)
            path.write_bytes(content)
            if path.parent.name == "train":  # the manifest goes with the length, or nothing else would be looked at
                manifest = path.with_name("manifest.json")
                found = json.loads(manifest.read_text())
                found["shards"][0]["bytes"] = max(len(content), 1)
                manifest.write_text(json.dumps(found))
            try:
                outcome = "same" if read(path) == as_written else "other"
            except (ValueError, FileNotFoundError) as error:
                outcome = (
                    "refused" if str(path.parent) in str(error) and "\n" not in str(error) else f"unclear {error!r}"
                )
            except BaseException as error:
                outcome = f"unexpected {error!r}"
            print(kind, " ".join(outcome.split()), file=said, flush=True)


def outcomes(read, path: Path, times: int) -> list[list[str]]:
    """[number, kind, outcome …] of every damage; what crashed has no more than its number."""
    raw, report = path.read_bytes(), path.parent.parent / "report"
    lines: list[list[str]] = []
    while len(lines) < times:
        path.write_bytes(raw)
        child = multiprocessing.get_context("spawn").Process(
            target=read_all, args=(read, path, raw, range(len(lines), times), report)
        )
        child.start()
        child.join(timeout=100)
        hung = child.is_alive()
        child.kill()
        child.join()
        assert not hung, f"damage {report.read_text().splitlines()[-1]} hangs"
        lines = [line.split() for line in report.read_text().splitlines()]
        if len(lines) < times:
            assert child.exitcode in CRASHES, child.exitcode
            with report.open("a") as said:
                print(file=said)
    return lines


@pytest.mark.parametrize("kind", ["images", "jpeg"])
def test_a_damaged_shard(tmp_path, kind, request):
    if kind == "images":
        ShardWriter(tmp_path, "train", classes=["a", "b"]).write(IMAGES, LABELS)
    else:
        files, _ = request.getfixturevalue("jpeg_files")(N)
        JpegShardWriter(tmp_path, "train", classes=["a", "b"]).write(files, LABELS)
    lines = outcomes(read_shards, next((tmp_path / "train").glob("*.h5")), 500)
    said = [" ".join(line[2:]) for line in lines]
    assert {outcome for outcome in said if outcome} == {"refused", "same"}  # "same": damage of bytes that mean nothing
    assert said.count("") < 20
    assert all(outcome == "refused" for line, outcome in zip(lines, said, strict=True) if line[1:2] == ["cut"])


LAYOUTS = {
    "contiguous": {},
    "gzip": {"chunks": (9, 4, 3, 2), "compression": "gzip", "shuffle": True},
    "fletcher32": {"chunks": (9, 4, 3, 2), "fletcher32": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_somebody_else_s_damaged_file(tmp_path, layout):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "mine.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=IMAGES, **LAYOUTS[layout])
        file.create_dataset("labels", data=LABELS)
    said = {" ".join(line[2:]) for line in outcomes(read_foreign, path, 300)}
    assert said <= {"refused", "same", "other", ""}


def test_the_damages_meet_every_part_of_a_file():
    raw = bytes(range(256)) * 40
    places = np.zeros(len(raw), bool)
    for number in range(500):
        _, content = damaged(raw, number)
        places[: len(content)] |= np.frombuffer(content, np.uint8) != np.frombuffer(raw[: len(content)], np.uint8)
    assert places.mean() > 0.9
