"""Choosing a storage: how much memory the node can give, and what file system the shards lie on."""

from __future__ import annotations

import os
import re
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hvdlocal.communicator.base import Communicator

MODES = ("auto", "ram", "mmap", "stream")

LOCAL_FILE_SYSTEMS = frozenset(
    (
        "bcachefs",
        "btrfs",
        "ext2",
        "ext3",
        "ext4",
        "f2fs",
        "jfs",
        "nilfs2",
        "overlay",
        "ramfs",
        "reiserfs",
        "tmpfs",
        "xfs",
        "zfs",
    )
)
"""Where a page fault costs a disk access and not a round trip to a server."""


@dataclass(frozen=True)
class Node:
    """The machine that a process runs on.

    Attributes:
        host: identifies the running machine.
        namespace: identifies the processes that can see each other on it; a machine may hold several (containers).
    """

    host: str
    namespace: int


@dataclass(frozen=True)
class Choice:
    """What was decided, the same on all ranks.

    Attributes:
        mode: "ram", "mmap" or "stream".
        reason: why, for people.
        stream_bytes: what one process may hold in mode "stream".
    """

    mode: str
    reason: str
    stream_bytes: int


def this_node() -> Node:
    """The machine of this process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # no usable /proc: then nothing can be shared either, and every process is a machine of its own
        boot, namespace = "", os.getpid()
    return Node(f"{socket.gethostname()} {boot}", namespace)


def choose(storage: str, total_bytes: int, path: Path, obstacle: str | None, communicator: Communicator) -> Choice:
    """Decides where the bytes of a split shall lie; a collective.

    Args:
        storage: "auto", or what the user wants.
        total_bytes: the size of the data.
        path: one of the files; with an obstacle, one that has it.
        obstacle: why the bytes do not lie in the files as they are ("chunked or compressed"); None if they do.

    Raises:
        ValueError: on every rank, when the user's wish cannot be met.
    """
    if storage not in MODES:
        raise ValueError(f"storage is {storage!r}; choose 'auto', 'ram', 'mmap' or 'stream'")
    mine = (this_node(), available_bytes(), file_system(path))
    everyone = communicator.gather(mine, "hvdlocal.data.choice")
    copies = Counter(host for host, _ in {(node.host, node.namespace) for node, _, _ in everyone})
    ranks = Counter(node.host for node, _, _ in everyone)
    available, copies_there = min((free // copies[node.host], copies[node.host]) for node, free, _ in everyone)
    slow = sorted({kind for _, _, kind in everyone if kind not in LOCAL_FILE_SYSTEMS})
    kinds = sorted({kind for _, _, kind in everyone})
    stream_bytes = min(free // 4 // ranks[node.host] for node, free, _ in everyone)

    size, room = size_text(total_bytes), f"the {size_text(available)} that the node can give"
    if copies_there > 1:
        room += f" to each of {copies_there} containers"
    if storage == "ram" and total_bytes > available:
        raise ValueError(
            f"storage 'ram' needs {size}, more than {room}; choose 'mmap' or 'stream', or ask for more memory"
        )
    if obstacle is not None and storage == "mmap":
        raise ValueError(
            f"storage 'mmap' cannot read the {size} of samples of which those in {path} are {obstacle}; write "
            "them as shards (python -m data_prep arrays, or ShardWriter), or choose 'auto', which unpacks them"
        )
    if obstacle is not None and storage != "stream":
        if total_bytes <= available:
            return Choice("ram", f"{size}, {obstacle}, are unpacked once", stream_bytes)
        reason = f"{size}, {obstacle}, exceed {room}, and are unpacked again in every epoch"
        return Choice("stream", reason, stream_bytes)
    if storage != "auto":
        return Choice(storage, "as asked for", stream_bytes)
    if total_bytes <= available // 2:
        return Choice("ram", f"{size} fit in half of {room}", stream_bytes)
    if not slow:
        return Choice(
            "mmap", f"{size} exceed half of {room}, and {', '.join(kinds)} is a local file system", stream_bytes
        )
    return Choice(
        "stream", f"{size} exceed half of {room}, and {', '.join(slow)} is no local file system", stream_bytes
    )


def size_text(count: int) -> str:
    """Formats a number of bytes: 93.8 KiB, 5.86 MiB, 0.14 GiB."""
    name, size = next(
        ((name, size) for name, size in (("KiB", 2**10), ("MiB", 2**20)) if count < 1000 * size), ("GiB", 2**30)
    )
    return f"{count / size:.3g} {name}"


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process could still fill: what the kernel deems available, within the limits of its cgroups."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", (proc / "meminfo").read_text(), re.MULTILINE)
    available = int(match[1]) * 1024 if match else 0
    return max(0, min([available, *_cgroup_room(proc, cgroups)]))


def _cgroup_room(proc: Path, cgroups: Path) -> Iterator[int]:
    """What every memory cgroup that this process is in, and each of their parents, leaves."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, limit, usage, cache = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        folder = root / path.strip("/")
        for group in [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]:
            try:
                most = (group / limit).read_text().strip()
                if most != "max":
                    used = int((group / usage).read_text())
                    match = re.search(rf"^{cache} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
                    yield int(most) - used + (int(match[1]) if match else 0)
            except OSError:  # a container may see other paths than the kernel names, and the root has no limit
                continue


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Type of the file system that a file lies on, as in /proc/filesystems; "unknown" where that cannot be told."""
    best, kind = "", "unknown"
    real = os.path.realpath(path)
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return kind
    for line in lines:
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), before.split(" ")[4])
        inside = point == "/" or real == point or real.startswith(point + "/")
        if inside and len(point) >= len(best):  # of several on one point, the last hides the others
            best, kind = point, after.split(" ")[0]
    return kind
