"""Which storage is chosen, and by what."""

import re

import pytest

from hvdlocal.communicator import SingleProcess
from hvdlocal.data import ShardedDataset
from hvdlocal.data.read.storage import select
from hvdlocal.data.read.storage.select import available_bytes, choose, file_system

GIB = 1 << 30


class Ranks:
    """A communicator whose other ranks report what the test says."""

    def __init__(self, *others):
        self.others = others

    def gather(self, value, name):
        return [value, *self.others]


@pytest.fixture
def machine(monkeypatch):
    def make(free, kind):
        monkeypatch.setattr(select, "available_bytes", lambda: free)
        monkeypatch.setattr(select, "file_system", lambda path: kind)
        monkeypatch.setattr(select, "this_node", lambda: select.Node("here", 1))

    return make


@pytest.mark.parametrize(
    ("size", "kind", "mode", "reason"),
    [
        (4 * GIB, "lustre", "ram", "4 GiB fit in half of the 8 GiB that the node can give"),
        (
            4 * GIB + 1,
            "ext4",
            "mmap",
            "4 GiB exceed half of the 8 GiB that the node can give, and ext4 is a local file system",
        ),
        (5 * GIB, "lustre", "stream", "lustre is no local file system"),
        (5 * GIB, "nfs4", "stream", "nfs4 is no local file system"),
        (5 * GIB, "fuse.sshfs", "stream", "fuse"),
        (5 * GIB, "unknown", "stream", "unknown"),
    ],
)
def test_auto(machine, tmp_path, size, kind, mode, reason):
    machine(8 * GIB, kind)
    found = choose("auto", size, tmp_path, None, SingleProcess())
    assert found.mode == mode
    assert reason in found.reason
    assert found.stream_bytes == 2 * GIB


def test_the_smallest_node_decides_for_all(machine, tmp_path):
    machine(64 * GIB, "ext4")
    there = select.Node("there", 1)
    found = choose("auto", 8 * GIB, tmp_path, None, Ranks((there, 8 * GIB, "ext4"), (there, 8 * GIB, "ext4")))
    assert found.mode == "mmap"
    assert found.stream_bytes == GIB, "a quarter of the free memory, for each of the ranks there"
    found = choose("auto", 8 * GIB, tmp_path, None, Ranks((there, 8 * GIB, "lustre")))
    assert found.mode == "stream"


def test_ranks_that_do_not_see_each_other_need_a_copy_each(machine, tmp_path):
    machine(8 * GIB, "ext4")
    same, container = select.Node("here", 1), select.Node("here", 2)
    assert choose("auto", 3 * GIB, tmp_path, None, Ranks((same, 8 * GIB, "ext4"))).mode == "ram"
    assert choose("auto", 3 * GIB, tmp_path, None, Ranks((container, 8 * GIB, "ext4"))).mode == "mmap"


def test_a_wish_is_followed(machine, tmp_path):
    machine(8 * GIB, "lustre")
    for mode in ("ram", "mmap", "stream"):
        assert choose(mode, 5 * GIB, tmp_path, None, SingleProcess()).mode == mode


@pytest.mark.parametrize(
    ("storage", "size", "mode"), [("auto", 7, "ram"), ("auto", 9, "stream"), ("stream", 1, "stream")]
)
def test_what_must_be_unpacked_is_unpacked_once_if_it_fits(machine, tmp_path, storage, size, mode):
    machine(8 * GIB, "ext4")
    found = choose(storage, size * GIB, tmp_path, "compressed", SingleProcess())
    assert found.mode == mode
    if storage == "auto":
        said = "are unpacked once" if mode == "ram" else "exceed the 8 GiB .* and are unpacked again in every epoch"
        assert re.search(f"{size} GiB, compressed, {said}", found.reason)


@pytest.mark.parametrize(
    ("storage", "size", "obstacle", "message"),
    [
        ("ram", 9 * GIB, None, r"'ram' needs 9 GiB, more than the 8 GiB .* choose 'mmap' or 'stream'"),
        ("disk", 1, None, "storage is 'disk'; choose"),
        (
            "mmap",
            1,
            "chunked or compressed",
            r"storage 'mmap' cannot read .*chunked or compressed; write them as shards",
        ),
    ],
)
def test_impossible_wishes(machine, tmp_path, storage, size, obstacle, message):
    machine(8 * GIB, "ext4")
    with pytest.raises(ValueError, match=message):
        choose(storage, size, tmp_path, obstacle, SingleProcess())


def test_wishes_of_a_user(make_dataset, tmp_path):
    assert make_dataset(10).describe().startswith("ram: ")
    with pytest.raises(ValueError, match="storage is 'disk'"):
        ShardedDataset(tmp_path, storage="disk")
    with pytest.raises(ValueError, match="share is 'rack'; choose 'node' or 'job'"):
        ShardedDataset(tmp_path, share="rack")


def kernel(root, meminfo_kb, cgroup, files):
    """A /proc and /sys/fs/cgroup with the given content."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {meminfo_kb} kB\n")
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, content in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root / "proc", root / "cgroup"


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("", {}, 8000 * 1024),
        (
            "0::/slurm/job_7\n",
            {
                "slurm/job_7/memory.max": 5_000_000,
                "slurm/job_7/memory.current": 3_000_000,
                "slurm/job_7/memory.stat": "anon 1\ninactive_file 400000",
            },
            2_400_000,
        ),
        (
            "0::/slurm/job_7\n",
            {
                "slurm/job_7/memory.max": "max",
                "slurm/memory.max": 1_000_000,
                "slurm/memory.current": 1_500_000,
                "slurm/memory.stat": "inactive_file 0",
            },
            0,
        ),
        (
            "4:memory:/job\n0::/\n",
            {
                "memory/job/memory.limit_in_bytes": 6_000_000,
                "memory/job/memory.usage_in_bytes": 1_000_000,
                "memory/job/memory.stat": "inactive_file 7\ntotal_inactive_file 500",
            },
            5_000_500,
        ),
        ("4:cpu,memory:/elsewhere\n", {}, 8000 * 1024),
    ],
    ids=["none", "v2", "v2-parent-full", "v1", "not-mounted"],
)
def test_available_memory(tmp_path, cgroup, files, expected):
    assert available_bytes(*kernel(tmp_path, 8000, cgroup, files)) == expected


def test_available_memory_here():
    assert 0 < available_bytes() < 1 << 50


def test_file_system(tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "23 22 0:5 / /scratch rw - lustre 10.0.0.1@o2ib:/scratch rw\n"
        "24 23 0:6 / /scratch/my\\040disk rw master:3 - xfs /dev/sdb rw\n"
        "25 22 0:7 / /tmp rw - ext4 /dev/sdc rw\n"
        "26 25 0:8 / /tmp rw - tmpfs tmpfs rw\n"
    )
    found = [
        file_system(path, mounts)
        for path in ("/a", "/scratch", "/scratch/b", "/scratchy", "/scratch/my disk/c", "/tmp/d")
    ]
    assert found == ["ext4", "lustre", "lustre", "ext4", "xfs", "tmpfs"]
    assert file_system("/a", tmp_path / "missing") == "unknown"
    assert file_system("/proc/self") == "proc"
