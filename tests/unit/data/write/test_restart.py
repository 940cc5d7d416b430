"""Writers killed by a real SIGKILL at every step they take in the file system, and run again."""

import os
import signal
import sys

import numpy as np
import pytest

from hvdlocal.data import JpegShardWriter, ShardWriter, verify
from hvdlocal.data.format.manifest import Manifest
from hvdlocal.data.permutations import pre_shuffle
from hvdlocal.lock import hold

CLASSES = ("ant", "bee", "cat", "dog", "eel")
STEPS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "test.read")

fault = {"at": 0, "count": 0, "directory": ""}


def _hook(event, arguments):
    if not fault["at"] or event not in STEPS:
        return
    if event == "test.read" or fault["directory"] in str(arguments[0]):
        fault["count"] += 1
        if fault["count"] == fault["at"]:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(_hook)  # for ever, but idle without a fault


def killed_at(step, directory, work):
    """Does the work in a child that kills itself at a step; returns whether it came to that."""
    child = os.fork()
    if child == 0:
        try:
            fault.update(at=step, count=0, directory=str(directory))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


class Recorded:
    """Samples that note which were read."""

    def __init__(self, samples):
        self.samples, self.read = samples, set()
        if isinstance(samples, np.ndarray):
            self.shape, self.dtype = samples.shape, samples.dtype

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, rows):
        sys.audit("test.read", rows)
        self.read |= set(np.atleast_1d(rows).tolist())
        return self.samples[rows]


def content(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def check_restarts(tmp_path, work, samples, num_shards, before=lambda directory: None):
    """Kills ``work(directory, samples)`` at step 1, 2, …, and lets it run again each time."""
    before(tmp_path / "reference")
    old = content(tmp_path / "reference")
    work(tmp_path / "reference", Recorded(samples))
    expected = content(tmp_path / "reference")
    order = pre_shuffle(0, len(samples))
    bounds = [len(order) * i // num_shards for i in range(num_shards + 1)]
    finished_counts = set()
    step = 0
    while True:
        step += 1
        directory = tmp_path / f"killed-at-{step}"
        before(directory)
        if not killed_at(step, directory, lambda directory=directory: work(directory, Recorded(samples))):
            break
        # Whatever a manifest names belongs together: it is the old data set or the new one, whole.
        if (directory / "train" / "manifest.json").exists():
            verify(directory)
            names = {"manifest.json", *(e.file for e in Manifest.load(directory / "train" / "manifest.json").shards)}
            found = {
                path: data for path, data in content(directory).items() if path.name in names and len(path.parts) == 2
            }
            assert found in ({p: d for p, d in old.items() if p.name in names}, expected)
        finished = [path.name for path in (directory / "train" / ".unfinished").glob("*.h5.json")]
        finished_counts.add(len(finished))
        again = Recorded(samples)
        work(directory, again)
        assert content(directory) == expected, f"after a kill at step {step}"
        kept = {
            row for name in finished for row in order[slice(*bounds[int(name[6:11]) : int(name[6:11]) + 2])].tolist()
        }
        assert not kept & again.read, "finished shards are kept"
    assert finished_counts == set(range(num_shards + 1))
    assert step > 4 * num_shards


@pytest.fixture(autouse=True)
def _no_fault():
    yield
    fault["at"] = 0


def write_images(directory, images):
    labels = np.arange(len(images)) * 7 % 5
    ShardWriter(directory, "train", classes=CLASSES, num_shards=3, overwrite=True).write(images, labels, identity="i")


def test_images(tmp_path, source):
    check_restarts(tmp_path, write_images, source(200)[0], 3)


def test_images_over_another_data_set(tmp_path, source):
    def before(directory):
        images, labels = source(200)
        ShardWriter(directory, "train", classes=CLASSES, num_shards=3).write(images ^ 255, labels)

    check_restarts(tmp_path, write_images, source(200)[0], 3, before)


def test_jpeg(tmp_path, jpeg_files):
    files, labels = jpeg_files(30)

    def work(directory, samples):
        JpegShardWriter(directory, "train", classes=CLASSES, num_shards=2, threads=1).write(
            samples, labels, identity="i"
        )

    check_restarts(tmp_path, work, files, 2)


@pytest.mark.parametrize("overwrite", [False, True])
def test_mending_a_finished_data_set(tmp_path, source, overwrite):
    def write_images(directory, images):
        labels = np.arange(len(images)) * 7 % 5
        ShardWriter(directory, "train", classes=CLASSES, num_shards=3, overwrite=overwrite).write(
            images, labels, identity="i"
        )

    def before(directory):
        write_images(directory, source(200)[0])
        path = directory / "train" / "train-00001-of-00003.h5"
        path.write_bytes(path.read_bytes()[:-1])

    before(tmp_path / "reference")
    write_images(tmp_path / "reference", source(200)[0])
    expected = content(tmp_path / "reference")
    step = 0
    while True:
        step += 1
        directory = tmp_path / f"killed-at-{step}"
        before(directory)
        if not killed_at(step, directory, lambda directory=directory: write_images(directory, source(200)[0])):
            break
        write_images(directory, source(200)[0])
        assert content(directory) == expected, f"after a kill at step {step}"
    assert step > 5


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "receipt", "labels"])
def test_a_finished_shard_that_was_damaged_since_is_written_again(tmp_path, source, damage):
    images, labels = source(200)
    writer = ShardWriter(tmp_path, "train", classes=CLASSES, num_shards=2)

    class Broken(Recorded):
        def __getitem__(self, rows):
            if len(self.read) >= 100:
                raise OSError("source lost")
            return super().__getitem__(rows)

    with pytest.raises(OSError, match="source lost"):
        writer.write(Broken(images), labels, identity="i")
    path = tmp_path / "train" / ".unfinished" / "train-00000-of-00002.h5"
    receipt = path.with_name(f"{path.name}.json")
    raw = bytearray(path.read_bytes())
    if damage == "bit":
        raw[raw.index(images[pre_shuffle(0, 200)[0]].tobytes()) + 5] ^= 1
        path.write_bytes(raw)
    elif damage == "cut":
        path.write_bytes(raw[:-1])
    elif damage == "gone":
        path.unlink()
    elif damage == "receipt":
        receipt.write_text(receipt.read_text().replace('"num_samples": 100', '"num_samples": 99'))
    else:
        at = raw.index(labels[pre_shuffle(0, 200)[:100]].astype("<i4").tobytes())
        raw[at] ^= 1
        path.write_bytes(raw)
    again = Recorded(images)
    writer.write(again, labels, identity="i")
    assert len(again.read) == 200
    verify(tmp_path)


def test_another_data_set_half_way_is_refused_unless_overwrite(tmp_path, source):
    images, labels = source(200)

    class Broken(Recorded):
        def __getitem__(self, rows):
            if len(self.read) >= 100:
                raise OSError("source lost")
            return super().__getitem__(rows)

    with pytest.raises(OSError, match="source lost"):
        ShardWriter(tmp_path, "train", classes=CLASSES, num_shards=2).write(Broken(images), labels, identity="i")
    before = content(tmp_path)
    with pytest.raises(
        FileExistsError,
        match=r"unfinished holds 1 shard of a different data set.*with --overwrite \(from Python: overwrite=True\)",
    ):
        ShardWriter(tmp_path, "train", classes=CLASSES, num_shards=2, seed=1).write(images, labels, identity="i")
    assert content(tmp_path) == before
    for directory, overwrite in ((tmp_path, True), (tmp_path / "direct", False)):
        ShardWriter(directory, "train", classes=CLASSES, num_shards=2, seed=1, overwrite=overwrite).write(
            images, labels, identity="i"
        )
    assert content(tmp_path / "train") == content(tmp_path / "direct" / "train")


def test_a_damaged_data_set_whose_source_changed(tmp_path, source):
    images = source(200)[0]
    write_images(tmp_path, images)
    (tmp_path / "train" / "train-00001-of-00003.h5").unlink()
    with pytest.raises(FileExistsError, match="its source has changed since"):
        write_images(tmp_path, images ^ 1)


def test_a_full_disk(tmp_path, source):
    """A limit on the size of files stands in for it: the same calls fail in the same way."""
    import resource

    images = np.zeros((3000, 16, 16, 3), np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match=r"File too large while writing: .*train-00000-of-00001\.h5\.tmp"):
            ShardWriter(tmp_path, "train", classes=CLASSES).write(images, np.zeros(3000, int), identity="i")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert not content(tmp_path)


def test_one_writer_at_a_time(tmp_path, monkeypatch):
    """The second is told who the first is; the first leaves no trace of it."""
    monkeypatch.setattr("hvdlocal.data.write.staging.hold", lambda *file: hold(*file, patience_seconds=0.1))
    inside = []

    class Images(np.ndarray):
        def __getitem__(self, rows):
            if not inside:
                inside.append(True)
                with pytest.raises(
                    FileExistsError, match=rf"is being written by another process \(process {os.getpid()}"
                ):
                    ShardWriter(tmp_path, "train", classes=["a"]).write(
                        np.ones((9, 2, 2, 1), np.uint8), np.zeros(9, int)
                    )
            return super().__getitem__(rows)

    images = np.zeros((9, 2, 2, 1), np.uint8).view(Images)
    ShardWriter(tmp_path, "train", classes=["a"]).write(images, np.zeros(9, int), identity="i")
    assert inside
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["manifest.json", "train-00000-of-00001.h5"]


def test_a_lock_without_its_process_is_none(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / ".lock").write_text("process 1 on a node that died")
    ShardWriter(tmp_path, "train", classes=["a"]).write(np.zeros((9, 2, 2, 1), np.uint8), np.zeros(9, int))
    assert not (tmp_path / "train" / ".lock").exists()
