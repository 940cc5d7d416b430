"""What storages ask of the operating system, as strace sees it, and what a killed job leaves behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from support.launch import HVDLOCAL, MPIRUN, ROOT, environment, launch, mpirun
from support.shared_memory import names_of_data

MIB = 1 << 20
READ = """
import sys
import numpy as np
from hvdlocal import ShardedDataset
dataset = ShardedDataset(sys.argv[1], storage=sys.argv[2])
order = np.random.RandomState(0).permutation(len(dataset))
dataset.read_ahead(order[:1000])
for i in range(0, len(order), 256):
    dataset.take(order[i:i + 256])
dataset.close()
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """12,000 images of 3 KiB in three shards of 12 MiB."""
    from hvdlocal import ShardWriter

    directory = tmp_path_factory.mktemp("large")
    images = np.random.RandomState(0).randint(0, 256, (12_000, 32, 32, 3)).astype(np.uint8)
    ShardWriter(directory, "train", classes=["a"], num_shards=3).write(images, np.zeros(12_000, int))
    return directory


def calls_of(large, tmp_path, storage):
    """By shard: the number of times it was opened, and the (offset, length) of each read, of HDF5 and of hvdlocal."""
    if shutil.which("strace") is None:
        pytest.skip("no strace on this machine")
    trace = tmp_path / "trace"
    # Whole lines per call, so that those of threads do not interrupt each other; descriptors come with their paths.
    command = [
        "strace",
        "-ff",
        "-y",
        "-s",
        "0",
        "-e",
        "trace=open,openat,read,readv,pread64,preadv,preadv2",
        "-o",
        str(trace),
    ]
    result = launch(*command, sys.executable, "-c", READ, str(large), storage)
    if re.search("ptrace|PTRACE", result.err):
        pytest.skip(f"strace may not trace here: {result.err.strip()[:200]}")
    assert result.code == 0, result.err
    opened, hdf5, own = defaultdict(int), defaultdict(list), defaultdict(list)
    for file in tmp_path.glob("trace.*"):
        for line in file.read_text(errors="replace").splitlines():
            if match := re.match(r'open(?:at)?\(.*"[^"]*/(train-\S+\.h5)".* = \d', line):
                opened[match[1]] += 1
            elif match := re.match(r"pread64\(\d+<.*/(train-\S+\.h5)>.*, (\d+)\) += (\d+)", line):
                hdf5[match[1]].append((int(match[2]), int(match[3])))
            elif match := re.match(r"preadv2?\(\d+<.*/(train-\S+\.h5)>, \[.*\], 1, (\d+)(?:, 0)?\) += (\d+)", line):
                own[match[1]].append((int(match[2]), int(match[3])))
            else:
                assert not re.search(r"/train-\S+\.h5", line), f"a call that was not expected: {line}"
    return opened, hdf5, own


def data_of(path):
    """The bytes of a file where its pixels lie: (first, behind the last)."""
    import h5py

    with h5py.File(path) as file:
        return file["images"].id.get_offset(), file["images"].id.get_offset() + file["images"].id.get_storage_size()


@pytest.mark.parametrize("storage", ["ram", "mmap", "stream"])
def test_system_calls(large, tmp_path, storage):
    """A shard is opened once by HDF5, for its labels, and once for its pixels; these come in large reads or none."""
    opened, hdf5, own = calls_of(large, tmp_path, storage)
    shards = sorted((large / "train").glob("*.h5"))
    assert opened == {shard.name: 2 for shard in shards}
    for shard in shards:
        first, end = data_of(shard)
        assert not [read for read in hdf5[shard.name] if first <= read[0] < end], "HDF5 reads no pixels"
        assert len(hdf5[shard.name]) < 25
        if storage == "mmap":
            assert not own[shard.name]
            continue
        assert sum(length for _, length in own[shard.name]) == end - first, "every byte once"
        offsets, lengths = zip(*sorted(own[shard.name]), strict=True)
        assert offsets == tuple(first + sum(lengths[:i]) for i in range(len(lengths))), "without gaps"
        if storage == "ram":
            assert list(offsets) == [offset for offset, _ in own[shard.name]], "from front to back"
            assert set(lengths[:-1]) == {8 * MIB}
        else:
            assert min(lengths) >= MIB
            assert max(lengths) < 3 * MIB


STAGE = """
import sys, time
import hvdlocal
communicator = hvdlocal.init(timeout_seconds=30)
dataset = hvdlocal.ShardedDataset(sys.argv[1], storage="ram", communicator=communicator)
assert (dataset._storages[0].region is not None) == (communicator.size > 1)
print("staged\\n", end="", flush=True)  # one write, also where nothing is buffered
time.sleep(60)
"""


def shared_memory():
    """Bytes of shared memory in use on this machine."""
    return int(re.search(r"^Shmem:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)[1]) * 1024


@pytest.mark.parametrize("backend", ["horovod", "mpi4py"])
def test_a_killed_job_leaves_no_memory_behind(large, tmp_path, backend):
    """SIGKILL to every rank, so that nothing can be tidied up."""
    script = tmp_path / "stage.py"
    script.write_text(STAGE)
    pids = tmp_path / "pids"
    pids.mkdir()
    rank = "${OMPI_COMM_WORLD_RANK:-$PMI_RANK}"
    job = subprocess.Popen(
        [*MPIRUN, "-np", "2", "bash", "-c", f"echo $$ > {pids}/{rank}; exec {sys.executable} {script} {large}"],
        cwd=ROOT,
        env=environment(HVDLOCAL_BACKEND=backend),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert job.stdout is not None
        assert [job.stdout.readline().strip() for _ in range(2)] == ["staged"] * 2
        ranks = [int(path.read_text()) for path in pids.iterdir()]
        inodes = {re.search(r"(\d+) +/memfd:hvdlocal-data", Path(f"/proc/{pid}/maps").read_text())[1] for pid in ranks}
        assert len(inodes) == 1, "one copy"
        assert not names_of_data()
        before = shared_memory()
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        job.wait(timeout=40)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
    assert not names_of_data()
    deadline = time.monotonic() + 20
    while shared_memory() > before - 30 * MIB:  # of 35 MiB
        assert time.monotonic() < deadline, "the memory was not given back"
        time.sleep(0.1)


def test_a_process_that_unpickles_finds_the_memory_of_its_parent(large, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        """
import multiprocessing, sys
import numpy as np
import hvdlocal

def read(dataset, rows):
    mapped = "memfd:hvdlocal-data" in open("/proc/self/maps").read()
    assert not mapped, "nothing is opened before it is needed"
    images = dataset.take(rows)
    return images, "memfd:hvdlocal-data" in open("/proc/self/maps").read()

if __name__ == "__main__":
    communicator = hvdlocal.init()
    dataset = hvdlocal.ShardedDataset(sys.argv[1], storage="ram", communicator=communicator)
    rows = np.arange(0, 12_000, 7)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        images, mapped = pool.apply(read, (dataset, rows))
    assert np.array_equal(images, dataset.take(rows))
    assert mapped
    print("found\\n", end="", flush=True)
    communicator.barrier("test.end")
"""
    )
    result = launch(*MPIRUN, "-np", "2", sys.executable, str(script), str(large), HVDLOCAL_BACKEND="mpi4py")
    assert result.code == 0, result.err
    assert result.out.split() == ["found"] * 2


@pytest.fixture
def flipped(tmp_path):
    """A configuration of a data set, 100 blocks of 64 images to train on, of which one has a wrong bit."""
    from hvdlocal import ShardWriter

    for split, count in (("train", 6400), ("test", 64)):
        images = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 1), dtype=np.uint8)
        ShardWriter(tmp_path / "data", split, classes=["a", "b"]).write(images, np.arange(count) % 2)
    shard = tmp_path / "data" / "train" / "train-00000-of-00001.h5"
    with shard.open("r+b") as file:
        file.seek(data_of(shard)[0] + 70 * 64 * 64 + 5)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {{path: {tmp_path}/data, batch_size: 2}}\nmodel: {{name: digits_cnn}}\nepochs: 20\noutput: {tmp_path}/out\n"
        "method: {preset: local, period: {period: 100}}\n"
    )
    return config


@pytest.mark.parametrize(("storage", "backend"), [("mmap", "horovod"), ("stream", "mpi4py")])
def test_damage_found_while_training_is_one_sentence_on_every_rank(flipped, tmp_path, backend, storage):
    command = [*HVDLOCAL, "train", str(flipped), "--data.storage", storage]
    for _ in range(2):  # the second start is told of nothing by what the first has left
        result = mpirun(2, *command, HVDLOCAL_BACKEND=backend, timeout=120)
        assert result.code == 2, result.err
        assert "Traceback" not in result.err
        said = [line.split(": ", 1) for line in result.err.splitlines() if line.startswith("hvdlocal (rank")]
        assert sorted(rank for rank, _ in said) == ["hvdlocal (rank 0)", "hvdlocal (rank 1)"], result.err
        assert said[0][1] == said[1][1]
        assert re.search(
            r"train-00000-of-00001\.h5 is damaged in samples 4480\.\.4543 .*\(rank . of 2 on .* found it", said[0][1]
        )
    assert not (tmp_path / "out" / "model.pt").exists()


def test_damage_found_by_one_process(flipped):
    result = launch(*HVDLOCAL, "train", str(flipped), "--data.storage", "mmap")
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert result.err.count("is damaged in samples 4480..4543") == 1
