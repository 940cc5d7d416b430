"""One copy of the data per node, staged by all of its ranks; mistakes heard by every rank."""

import os
import pickle
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.shared_memory import names_of_data

from hvdlocal import ShardedDataset, ShardWriter
from hvdlocal.communicator import DisagreementError
from hvdlocal.communicator.agreement import SetupError
from hvdlocal.data.format import extent
from hvdlocal.data.read import opening
from hvdlocal.data.read.storage import ram
from hvdlocal.data.read.user_hdf5 import open_hdf5

N, SHAPE = 6000, (16, 16, 4)
TOTAL = N * 1024


def images_of(n):
    images = np.random.RandomState(0).randint(0, 256, (n, *SHAPE)).astype(np.uint8)
    images.reshape(n, -1)[:, :4] = np.arange(n, dtype="<u4")[:, None].view(np.uint8)
    return images


@pytest.fixture
def directory(comm):
    """6,000 images of 1 KiB in five shards, in a folder that all ranks share."""
    mine = tempfile.mkdtemp() if comm.rank == 0 else None
    path = Path(comm.gather(mine, "test.directory")[0])
    if comm.rank == 0:
        ShardWriter(path, "train", classes=["a"], num_shards=5).write(images_of(N), np.zeros(N, int))
        with h5py.File(path / "own.h5", "w") as file:
            file.create_dataset("images", data=images_of(N), chunks=(100, *SHAPE), compression="lzf")
            file["labels"] = np.arange(N) % 3
    comm.barrier("test.written")
    yield path
    comm.barrier("test.read")
    if comm.rank == 0:
        shutil.rmtree(path)


@pytest.fixture
def reads(monkeypatch):
    """What this rank reads from shards: (file, first unit, last unit)."""
    found = []
    read = extent.FileReader.read

    def note(self, first, last, into):
        found.append((self._extent.path.name, first, last))
        read(self, first, last, into)

    monkeypatch.setattr(extent.FileReader, "read", note)
    return found


def check(dataset):
    rows = np.random.RandomState(1).permutation(N)
    expected = images_of(N)[dataset.index[rows]]
    assert np.array_equal(dataset.take(rows), expected)


def mapped_bytes():
    """(resident, proportional) bytes of the shared data in this process: the kernel divides shared pages by their users."""
    resident = proportional = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            inside = "memfd:hvdlocal-data" in line
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
        elif inside and line.startswith("Pss:"):
            proportional += int(line.split()[1]) * 1024
    return resident, proportional


@pytest.mark.parametrize("share", ["node", "job"])
def test_one_copy_per_node(comm, directory, share):
    before = names_of_data()
    with ShardedDataset(directory, storage="ram", communicator=comm, share=share) as dataset:
        check(dataset)
        comm.barrier("test.mapped")
        resident, proportional = mapped_bytes()
        comm.barrier("test.measured")
        if comm.size > 1:
            storage = dataset._storages[0]
            assert resident == TOTAL
            assert proportional == pytest.approx(TOTAL / comm.size, rel=0.02), "shared by all ranks"
            assert len(set(comm.gather(storage.region, "test.regions"))) == 1
            found = os.fstat(storage._descriptor)
            assert len(set(comm.gather((found.st_dev, found.st_ino), "test.inodes"))) == 1
            with pytest.raises(PermissionError):  # sealed
                os.pwrite(storage._descriptor, b"x", 0)
        assert names_of_data() <= before, "no name anywhere"
        comm.barrier("test.looked")


def test_the_ranks_of_a_node_share_the_reading(comm, directory, reads):
    with ShardedDataset(directory, storage="ram", communicator=comm):
        everyone = comm.gather(reads, "test.reads")
    units = [(name, unit) for theirs in everyone for name, first, last in theirs for unit in range(first, last)]
    assert len(units) == len(set(units)) == 5 * 19  # 1,200 images in units of 64
    assert all(theirs for theirs in everyone)


@pytest.mark.parametrize("piece", [64 << 20, 200 << 10])
def test_one_rank_of_the_job_reads_a_shard(comm, directory, reads, monkeypatch, piece):
    monkeypatch.setattr(ram, "_BROADCAST_BYTES", piece)
    with ShardedDataset(directory, storage="ram", communicator=comm, share="job") as dataset:
        check(dataset)
        everyone = comm.gather(reads, "test.reads")
    units = [(name, unit) for theirs in everyone for name, first, last in theirs for unit in range(first, last)]
    assert len(units) == len(set(units)) == 5 * 19
    if comm.size > 1:
        for number in range(5):
            name = f"train-{number:05d}-of-00005.h5"
            readers = [rank for rank, theirs in enumerate(everyone) if name in [file for file, _, _ in theirs]]
            assert readers == [number % comm.size]


def test_staging_in_rounds(comm, directory, reads, monkeypatch):
    monkeypatch.setattr(ram, "_ROUND_BYTES", 1 << 20)
    with ShardedDataset(directory, storage="ram", communicator=comm) as dataset:
        check(dataset)
        everyone = comm.gather(reads, "test.reads")
    units = [(name, unit) for theirs in everyone for name, first, last in theirs for unit in range(first, last)]
    assert len(units) == len(set(units)) == 5 * 19


def test_shards_are_opened_by_one_rank_each(comm, directory, monkeypatch):
    opened = []
    open_shard = opening.open_shard
    monkeypatch.setattr(opening, "open_shard", lambda path, *more: (opened.append(path), open_shard(path, *more))[1])
    with ShardedDataset(directory, storage="mmap", communicator=comm) as dataset:
        check(dataset)
    everyone = [name for theirs in comm.gather(opened, "test.opened") for name in theirs]
    assert len(everyone) == len(set(everyone)) == 5


@pytest.mark.parametrize("share", ["node", "job"])
def test_a_rank_that_cannot_open_the_memory_holds_its_own(comm, directory, monkeypatch, share):
    if comm.rank == comm.size - 1:

        def refuse(self):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(ram.Region, "open", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = ShardedDataset(directory, storage="ram", communicator=comm, share=share)
    told = comm.gather([str(w.message) for w in caught if "holds a copy" in str(w.message)], "test.warnings")
    if comm.size > 1:
        assert [len(one) for one in told] == [0] * (comm.size - 1) + [1]
        assert re.search(r"cannot open the data of rank 0 on the same node .*denied.*5\.86 MiB.*hidepid", told[-1][0])
    check(dataset)
    dataset.close()


@pytest.mark.parametrize("share", ["node", "job"])
def test_a_flipped_bit_is_one_sentence_on_every_rank(comm, directory, share):
    path = directory / "train" / "train-00003-of-00005.h5"
    if comm.rank == 0:
        with h5py.File(path) as file:
            offset = file["images"].id.get_offset()
        with path.open("r+b") as file:
            file.seek(offset + 700 * 1024)
            byte = file.read(1)[0]
            file.seek(offset + 700 * 1024)
            file.write(bytes([byte ^ 1]))
    comm.barrier("test.damaged")
    with pytest.raises(SetupError, match=rf"{path} is damaged in samples 640\.\.703 \(bytes") as caught:
        ShardedDataset(directory, storage="ram", communicator=comm, share=share)
    assert len(set(comm.gather(str(caught.value), "test.messages"))) == 1


def test_a_missing_shard_is_one_sentence_on_every_rank(comm, directory):
    if comm.rank == 0:
        (directory / "train" / "train-00002-of-00005.h5").unlink()
    comm.barrier("test.removed")
    with pytest.raises(SetupError, match=r"train-00002-of-00005\.h5 is missing") as caught:
        ShardedDataset(directory, communicator=comm)
    assert len(set(comm.gather(str(caught.value), "test.messages"))) == 1
    with pytest.raises(SetupError, match="holds no finished data set"):
        ShardedDataset(directory, "val", communicator=comm)


def test_ranks_that_want_different_things(comm, directory):
    if comm.size > 1:
        with pytest.raises(DisagreementError, match="storage: rank 1 has 'mmap', rank 0 has 'ram'"):
            ShardedDataset(directory, storage="mmap" if comm.rank else "ram", communicator=comm)


@pytest.mark.parametrize("storage", ["auto", "mmap", "stream"])
def test_other_storages(comm, directory, storage):
    with ShardedDataset(directory, storage=storage, communicator=comm) as dataset:
        assert dataset.storage == ("ram" if storage == "auto" else storage)
        check(dataset)
        assert len(set(comm.gather(dataset.describe(), "test.describe"))) == 1


@pytest.mark.parametrize("share", ["node", "job"])
def test_a_users_own_file(comm, directory, share):
    with open_hdf5(directory / "own.h5", communicator=comm, share=share) as dataset:
        assert np.array_equal(dataset.take(np.arange(N)), images_of(N))
        alone = open_hdf5(directory / "own.h5")
        assert (dataset.fingerprint, dataset.mean, dataset.std) == (alone.fingerprint, alone.mean, alone.std)


@pytest.mark.parametrize("storage", ["ram", "mmap", "stream"])
def test_images_behind_a_link_where_every_node_has_a_folder_of_its_own(comm, directory, storage):
    mine = directory / f"node{comm.rank}"
    (mine / "far").mkdir(parents=True)
    with h5py.File(mine / "far" / "source.h5", "w") as file:
        file["before"], file["images"] = np.arange(5000), images_of(N)
    with h5py.File(mine / "a.h5", "w") as file:
        file["images"], file["labels"] = h5py.ExternalLink("far/source.h5", "/images"), np.arange(N) % 3
    with open_hdf5(mine / "a.h5", storage=storage, communicator=comm) as dataset:
        assert np.array_equal(dataset.take(np.arange(N)), images_of(N))
        assert dataset._layouts[0].extents[0].path == mine / "far" / "source.h5"
        assert len(set(comm.gather(dataset.fingerprint, "test.fingerprints"))) == 1


def test_a_file_that_one_rank_names_twice_is_one_sentence_on_every_rank(comm, directory):
    own, other = directory / "own.h5", directory / f"other{comm.rank}.h5"
    if comm.rank == comm.size - 1:
        other.symlink_to(own)
    else:
        shutil.copy(own, other)
    with pytest.raises(SetupError, match="are the same samples, so each of them would come twice") as caught:
        open_hdf5([own, other], communicator=comm)
    assert len(set(comm.gather(str(caught.value), "test.messages"))) == 1


@pytest.mark.parametrize("where", ["for writing", "for reading"])
def test_memory_that_one_rank_cannot_map_is_one_sentence_on_every_rank(comm, directory, monkeypatch, where):
    def refuse(*args, **options):
        raise OSError(12, "Cannot allocate memory")

    if comm.rank == comm.size - 1:
        if where == "for writing":
            monkeypatch.setattr(ram.mmap, "mmap", refuse)
        else:
            monkeypatch.setattr(ram.RamStorage, "_map", refuse)
    if comm.size > 1:
        with pytest.raises(SetupError, match="Cannot allocate memory") as caught:
            ShardedDataset(directory, storage="ram", communicator=comm)
        assert len(set(comm.gather(str(caught.value), "test.messages"))) == 1


def test_room_for_nothing_on_one_rank_is_one_sentence_on_every_rank(comm, directory):
    with pytest.raises(SetupError, match="stream_bytes is 0; choose at least 1"):
        ShardedDataset(directory, communicator=comm, stream_bytes=None if comm.rank else 0)


@pytest.mark.parametrize("name", ["train", "own.h5"])
def test_a_pickle_finds_the_shared_memory(comm, directory, reads, monkeypatch, name):
    if name == "train":
        dataset = ShardedDataset(directory, storage="ram", communicator=comm)
    else:
        dataset = open_hdf5(directory / name, communicator=comm)
    reads.clear()
    monkeypatch.setattr("hvdlocal.data.read.storage.select.available_bytes", lambda: 0)  # no room for a copy
    if comm.size > 1:
        with pickle.loads(pickle.dumps(dataset)) as again:
            check(again)
            assert again.describe() == "ram: shared with the process that opened the data set"
            assert not reads
    comm.barrier("test.read_again")
    dataset.close()
