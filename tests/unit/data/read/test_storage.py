"""The storages: the same bytes out of each, damage found in each, and what each does to memory and files."""

import gc
import io
import os
import pickle
import re
import threading
import time
import weakref
from collections import Counter
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from PIL import Image

from hvdlocal.data import JpegShardWriter, ShardedDataset, ShardWriter
from hvdlocal.data.format.extent import FileReader
from hvdlocal.data.read.storage import Layout, Region
from hvdlocal.data.read.storage.mapped import MappedStorage, _arrange, _map
from hvdlocal.data.read.storage.select import this_node
from hvdlocal.data.read.storage.stream import StreamStorage

MODES = ["ram", "mmap", "stream"]
MIB = 1 << 20


def images_of(n, shape=(16, 16, 4)):
    """Image i: its index in the first four bytes, then noise that depends on it."""
    images = np.random.RandomState(0).randint(0, 256, (n, *shape)).astype(np.uint8)
    images.reshape(n, -1)[:, :4] = np.arange(n, dtype="<u4")[:, None].view(np.uint8)
    return images


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """8,000 images of 1 KiB in three shards: 8 blocks."""
    directory = tmp_path_factory.mktemp("large")
    ShardWriter(directory, "train", classes=["a"], num_shards=3).write(images_of(8000), np.zeros(8000, int))
    return directory


@pytest.fixture
def copy(large, tmp_path):
    """A copy that may be damaged, its shards, and a function that flips a bit of sample i of a shard."""
    for path in (large / "train").iterdir():
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / path.name).write_bytes(path.read_bytes())
    shards = sorted((tmp_path / "train").glob("*.h5"))

    def flip(shard, sample):
        with h5py.File(shards[shard]) as file:
            offset = file["images"].id.get_offset()
        with shards[shard].open("r+b") as file:
            file.seek(offset + sample * 1024 + 9)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))

    return SimpleNamespace(directory=tmp_path, shards=shards, flip=flip)


def open_files(directory):
    """How often each file below the directory is open in this process."""
    links = []
    for entry in os.scandir("/proc/self/fd"):
        try:
            links.append(os.readlink(entry.path))
        except OSError:  # the one of scandir itself
            continue
    return Counter(link for link in links if link.startswith(str(directory)))


@pytest.mark.parametrize("storage", MODES)
@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int32])
def test_every_storage_gives_the_same_bytes(large, storage, dtype):
    with ShardedDataset(large, storage=storage) as dataset:
        assert dataset.storage == storage
        assert dataset.describe() == f"{storage}: as asked for"
        expected = images_of(8000)[dataset.index]
        rows = np.random.RandomState(1).permutation(8000).astype(dtype)
        np.testing.assert_array_equal(dataset.take(rows), expected[rows])
        np.testing.assert_array_equal(dataset.take(rows[::3]), expected[rows[::3]])
        for sample in (0, 2665, 2666, 7999):
            assert bytes(dataset.bytes_of(sample)) == expected[sample].tobytes()
            assert dataset.bytes_of(sample).readonly


@pytest.mark.parametrize("storage", MODES)
def test_jpegs_come_out_as_they_went_in(tmp_path, storage):
    files = []
    for i in range(130):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8 + i % 5, 9 + i % 7, 3), i, np.uint8)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    JpegShardWriter(tmp_path, "train", classes=["a"], num_shards=3).write(files, np.zeros(130, int))
    with ShardedDataset(tmp_path, storage=storage) as dataset:
        assert (dataset.kind, dataset.shape) == ("jpeg", None)
        for sample, source in enumerate(dataset.index):
            assert bytes(dataset.bytes_of(sample)) == files[source]
            assert dataset.dims[sample].tolist() == [8 + source % 5, 9 + source % 7]
        with pytest.raises(ValueError, match="use Loader with a crop"):
            dataset.take([0])
        starts = dataset.block_starts
        assert starts.tolist() == [0, 43, 86, 130], "a small shard is one block"


@pytest.mark.parametrize("storage", MODES)
def test_no_hdf5_handle_stays_open(large, storage):
    with ShardedDataset(large, storage=storage) as dataset:
        kinds = h5py.h5f.OBJ_FILE | h5py.h5f.OBJ_DATASET | h5py.h5f.OBJ_GROUP | h5py.h5f.OBJ_ATTR
        assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, kinds) == 0
        dataset.take(np.arange(8000))
        expected = 1 if storage == "stream" else 0
        assert sorted(open_files(large).values()) == [1] * 3 * expected
    assert not open_files(large)


def test_files_and_threads_of_a_stream_that_nobody_closes(large):
    dataset = ShardedDataset(large, storage="stream")
    dataset.take([0])
    assert len(open_files(large)) == 3
    del dataset
    deadline = time.monotonic() + 10
    while open_files(large) or any(t.name == "hvdlocal-stream" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ram_is_staged_whole_and_refuses_a_flipped_bit(copy):
    copy.flip(1, 130)
    with pytest.raises(
        ValueError,
        match=rf"{copy.shards[1]} is damaged in samples 128\.\.191 \(bytes \d+\.\.\d+ of the file\): their crc32 is .* copy",
    ):
        ShardedDataset(copy.directory, storage="ram")


@pytest.mark.parametrize("storage", ["mmap", "stream"])
def test_a_flipped_bit_is_found_at_first_touch(copy, storage):
    copy.flip(1, 130)
    with ShardedDataset(copy.directory, storage=storage) as dataset:
        first = 8000 // 3
        assert len(dataset.take([0, 7999])) == 2
        with pytest.raises(ValueError, match=rf"{copy.shards[1]} is damaged in samples 128\.\.191 \(bytes"):
            dataset.take([0, first + 140])
        with pytest.raises(ValueError, match=r"samples 128\.\.191"):
            dataset.bytes_of(first + 128)  # again and again: damage is never forgotten
        with pytest.raises(ValueError, match=r"samples 128\.\.191"):
            dataset.take([first + 191])


def test_mmap_checks_every_unit_once(large, monkeypatch):
    from hvdlocal.data.format.shard import StoredColumn

    checked = []
    check_unit = StoredColumn.check_unit
    monkeypatch.setattr(
        StoredColumn,
        "check_unit",
        lambda self, unit, data: (checked.append((self.path, unit)), check_unit(self, unit, data)),
    )
    dataset = ShardedDataset(large, storage="mmap")
    for _ in range(2):
        for i in range(0, 8000, 100):
            dataset.take(np.arange(i, i + 100))
    assert len(checked) == len(set(checked)) == 3 * 42  # ceil(2667 / 64)


@pytest.mark.parametrize("storage", MODES)
def test_a_file_shorter_than_its_data(copy, storage):
    os.truncate(copy.shards[2], MIB)
    with pytest.raises(ValueError, match=rf"{copy.shards[2]} has {MIB} bytes where the manifest says \d+"):
        ShardedDataset(copy.directory, storage=storage)


def test_a_stream_notices_a_file_that_is_cut_off_while_it_runs(copy):
    with ShardedDataset(copy.directory, storage="stream") as dataset:
        os.truncate(copy.shards[2], 100_000)
        assert len(dataset.take([0])) == 1
        message = (
            rf"samples 6357\.\.7999 of the split cannot be read: {copy.shards[2]} now ends at byte 100000, but bytes"
        )
        with pytest.raises(ValueError, match=message):
            dataset.take([7999])


def test_short_reads_are_continued(large, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:100_001]], offset))
    for storage in ("ram", "stream"):
        with ShardedDataset(large, storage=storage) as dataset:
            np.testing.assert_array_equal(dataset.take(np.arange(8000)), images_of(8000)[dataset.index])


def test_errors_of_the_file_system_name_file_and_bytes(large, monkeypatch):
    def fail(descriptor, buffers, offset):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    message = r"train-00000-of-00003\.h5: bytes \d+\.\.\d+ cannot be read: Input/output error"
    with pytest.raises(OSError, match=message):
        ShardedDataset(large, storage="ram")
    with (
        ShardedDataset(large, storage="stream") as dataset,
        pytest.raises(OSError, match=rf"samples 0\.\.\d+ of the split cannot be read: .*{message}"),
    ):
        dataset.take([0])


# Blocks


def extent(tmp_path, name, offset, data, unit_bytes):
    path = tmp_path / name
    path.write_bytes(bytes(offset) + data)
    bounds = np.append(np.arange(0, len(data), unit_bytes), len(data))
    return SimpleNamespace(
        path=path, data_offset=offset, data_bytes=len(data), unit_bounds=bounds, check_unit=lambda unit, data: None
    )


def test_blocks_are_runs_of_whole_units_within_a_shard(large):
    starts = ShardedDataset(large, storage="mmap").block_starts
    # Shards of 2666 or 2667 images of 1 KiB: 1024 images (16 units of 64), and the rest, which is less than 2 MiB.
    assert starts.tolist() == [0, 1024, 2666, 2666 + 1024, 5333, 5333 + 1024, 8000]


@pytest.mark.parametrize(
    ("unit_bytes", "units", "expected"),
    [
        (MIB, 3, [0, 1, 2, 3]),
        (MIB - 1, 3, [0, 3]),  # two units make a block, and the third would be too small alone
        (MIB - 1, 4, [0, 2, 4]),
        (3 * MIB, 2, [0, 1, 2]),
        (100, 7, [0, 7]),
    ],
)
def test_block_sizes(unit_bytes, units, expected):
    bounds = np.arange(units + 1) * unit_bytes
    one = SimpleNamespace(data_bytes=int(bounds[-1]), unit_bounds=bounds)
    layout = Layout([one], unit_bytes, None, np.array([0, units]))
    assert layout.block_bounds.tolist() == [unit_bytes * unit for unit in expected]
    assert layout.block_starts.tolist() == expected


# mmap


@pytest.mark.parametrize("stride", [1, 3, 3072, 4096, 4095, 150_528, 12_288])
def test_maps_lie_a_multiple_of_the_sample_apart(stride):
    extents = [SimpleNamespace(data_offset=4096 * k, data_bytes=(k + 7) * stride) for k in (1, 256, 3)]
    starts, length = _arrange(extents, stride)
    assert all((start - starts[0]) % stride == 0 for start in starts)
    for one, start, following in zip(extents, starts, [*starts[1:], length], strict=True):
        assert start % 4096 == one.data_offset % 4096, "pages of files come as pages"
        assert start - start % 4096 >= 0
        assert start + one.data_bytes <= following - (following % 4096 if following != length else 0)


@pytest.mark.parametrize("offsets", [(4096, 8192), (2048, 2048 + 3), (1, 4097)])
def test_maps_at_any_offset(tmp_path, offsets):
    rows = np.random.RandomState(0).randint(0, 256, (90, 1000)).astype(np.uint8)
    parts = [rows[:50], rows[50:]]
    extents = [
        extent(tmp_path, f"{k}", offset, part.tobytes(), 64_000)
        for k, (offset, part) in enumerate(zip(offsets, parts, strict=True))
    ]
    storage = MappedStorage(Layout(extents, 1000, None, np.array([0, 50, 90])), "")
    order = np.random.RandomState(1).permutation(90)
    out = np.empty((90, 1000), np.uint8)
    storage.gather(order, out)
    np.testing.assert_array_equal(out, rows[order])
    assert bytes(storage.view(49_000, 50_000)) == rows[49].tobytes()
    assert bytes(storage.view(50_000, 51_000)) == rows[50].tobytes()


# stream


@pytest.fixture
def reads(monkeypatch):
    """The reads of blocks: (units, thread name), in order."""
    found = []
    read = FileReader.read

    def note(self, first, last, into):
        found.append((self._extent.path.name, first, len(into)))
        read(self, first, last, into)

    monkeypatch.setattr(FileReader, "read", note)
    return found


def stream_of(tmp_path, blocks, capacity_blocks):
    """Blocks of exactly 1 MiB, each made of 8 samples that are filled with the sample's number."""
    data = np.repeat(np.arange(8 * blocks, dtype=np.uint8), MIB // 8).tobytes()
    layout = Layout([extent(tmp_path, "a", 512, data, MIB)], MIB // 8, None, np.array([0, 8 * blocks]))
    return StreamStorage(layout, "", capacity_blocks * MIB)


def value_of(storage, sample):
    out = np.empty((1, MIB // 8), np.uint8)
    storage.gather(np.array([sample]), out)
    return out[0, 0], out[0, -1]


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_stream_keeps_what_was_used_last(tmp_path, reads):
    storage = stream_of(tmp_path, 20, 8)
    for block in range(8):
        assert value_of(storage, 8 * block + 3) == (8 * block + 3,) * 2
    assert value_of(storage, 0) == (0, 0)
    assert len(reads) == 8, "all are still here"
    value_of(storage, 8 * 8)  # the ninth: block 1 is the least recently used
    value_of(storage, 1)
    assert len(reads) == 9
    value_of(storage, 8)
    assert [first for _, first, _ in reads] == [*range(9), 1]
    assert {size for _, _, size in reads} == {MIB}
    storage.close()


def test_announced_samples_are_read_in_their_order_before_anybody_waits(tmp_path, reads, monkeypatch):
    monkeypatch.setattr("hvdlocal.data.read.storage.stream.NUM_THREADS", 1)
    storage = stream_of(tmp_path, 20, 8)
    storage.read_ahead(np.array([100, 101, 3, 101, 50, 80, 60, 10]))  # of blocks 12, 0, 6, 10, 7, 1
    wait_for(lambda: len(reads) == 4)  # half of the room
    time.sleep(0.05)
    assert [first for _, first, _ in reads] == [12, 0, 6, 10]
    assert value_of(storage, 100) == (100, 100)  # makes room for one more
    wait_for(lambda: len(reads) == 5)
    assert value_of(storage, 150) == (150, 150), "somebody who waits comes first"
    assert [first for _, first, _ in reads] == [12, 0, 6, 10, 7, 18]
    storage.close()


def test_announcements_that_nobody_follows_do_not_block_later_ones(tmp_path, reads):
    storage = stream_of(tmp_path, 40, 8)
    storage.read_ahead(np.arange(8 * 6))
    for sample in range(160, 320):
        assert value_of(storage, sample) == (sample % 256,) * 2
    storage.read_ahead(np.array([150]))
    wait_for(lambda: 18 in [first for _, first, _ in reads])
    storage.close()


def test_a_batch_larger_than_the_room(tmp_path):
    storage = stream_of(tmp_path, 30, 8)
    order = np.random.RandomState(0).permutation(240)
    out = np.empty((240, MIB // 8), np.uint8)
    storage.gather(order, out)
    np.testing.assert_array_equal(out[:, 5], order)
    assert storage._cache._held <= 8 * MIB
    storage.close()


def test_many_threads_read_a_stream(large):
    with ShardedDataset(large, storage="stream", stream_bytes=8 * MIB) as dataset:
        expected = images_of(8000)[dataset.index]
        failures = []

        def read(seed):
            random = np.random.RandomState(seed)
            for _ in range(30):
                rows = random.randint(0, 8000, 50)
                if not np.array_equal(dataset.take(rows), expected[rows]):
                    failures.append(seed)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not failures


def test_a_child_of_a_fork_can_read_on(large):
    dataset = ShardedDataset(large, storage="stream")
    expected = dataset.take([7999])
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(dataset.take([7999]), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    dataset.close()


def test_closing_ends_a_wait(large, monkeypatch):
    dataset = ShardedDataset(large, storage="stream")
    held = threading.Event()
    monkeypatch.setattr(FileReader, "read", lambda *args: held.wait(30))
    failures = []

    def read():
        try:
            dataset.take([0])
        except ValueError as error:
            failures.append(str(error))

    waiting = threading.Thread(target=read)
    waiting.start()
    monkeypatch.setattr("hvdlocal.data.read.storage.stream._STOP_TIMEOUT_SECONDS", 0.1)
    time.sleep(0.05)
    dataset.close()
    waiting.join(10)
    held.set()
    assert len(failures) == 1
    assert re.search("closed", failures[0])


# reading on while somebody closes, and sharing


def test_mmap_finds_damage_in_the_last_of_several_new_units(copy):
    copy.flip(0, 300)
    with ShardedDataset(copy.directory, storage="mmap") as dataset:
        with pytest.raises(ValueError, match=r"damaged in samples 256\.\.319 "):
            dataset.take([0, 64, 128, 300])
        dataset.take([0, 64, 128])
        with pytest.raises(ValueError, match=r"damaged in samples 256\.\.319 "):
            dataset.take([192, 300])


@pytest.mark.parametrize("mode", ["ram", "mmap"])
def test_a_reader_that_began_before_the_close_goes_on(large, mode):
    """It holds the storage, and with it the memory."""
    dataset = ShardedDataset(large, storage=mode)
    storage, rows, out = dataset._storages[0], np.arange(0, 8000, 7), np.empty((1143, 1024), np.uint8)
    dataset.close()
    storage.gather(rows, out)
    np.testing.assert_array_equal(out, images_of(8000)[dataset.index[rows]].reshape(-1, 1024))
    assert bytes(storage.view(0, 1024)) == out[0].tobytes()
    memory = weakref.ref(storage._memory)
    del storage
    gc.collect()
    assert memory() is None, "released with the last reader"


def test_a_pickle_finds_shared_memory_before_anything_is_chosen(large, monkeypatch):
    """A node that has given all its memory to the first copy has none left for a second."""
    dataset = ShardedDataset(large, storage="ram")
    memory = os.memfd_create("test")
    os.write(memory, dataset.take(np.arange(8000)).tobytes())
    found = os.fstat(memory)
    region = Region(this_node(), os.getpid(), memory, found.st_dev, found.st_ino)
    monkeypatch.setattr("hvdlocal.data.read.storage.select.available_bytes", lambda: 0)
    monkeypatch.setattr(dataset._storages[0], "region", region)
    again = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(again.take(np.arange(8000)), dataset.take(np.arange(8000)))
    assert again.describe() == "ram: shared with the process that opened the data set"
    pickled = pickle.dumps(again)
    again.close()
    os.close(memory)
    gone = pickle.loads(pickled)
    with pytest.raises(ValueError, match="more than the 0 KiB that the node can give"):
        gone.take([0])


def test_addresses_are_not_wasted_on_odd_sizes():
    """Aligned, samples of this size would lie 150,529 pages apart: 588 MiB for each file."""
    extents = [SimpleNamespace(data_offset=4096, data_bytes=7 * 150_529) for _ in range(4)]
    starts, length = _arrange(extents, 150_529)
    assert length <= 4 * (7 * 150_529 + 2 * 4096)
    assert all(start % 4096 == 0 for start in starts)


def test_addresses_that_cannot_be_had_are_a_sentence(tmp_path):
    one = SimpleNamespace(path=tmp_path / "a.h5", data_offset=0, data_bytes=2**60)
    for length in (2**60, 2**70):
        with pytest.raises(
            OSError, match=r"a\.h5 cannot be mapped into memory \(.*\); choose storage 'ram' or 'stream'"
        ):
            _map([one], [0], length)
