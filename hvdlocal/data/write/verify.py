"""Checking finished data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hvdlocal.communicator import Communicator, SingleProcess, succeed_together
from hvdlocal.data.format.manifest import MANIFEST_NAME, Manifest
from hvdlocal.data.format.shard import open_shard


def verify(
    directory: str | Path, *, communicator: Communicator | None = None, splits: Sequence[str] | None = None
) -> dict[str, int]:
    """Compares all checksums of finished splits in `directory`; returns the number of samples of each.

    Args:
        directory: of the data set.
        communicator: ranks that share out the work; None for this process alone.
        splits: the splits; by default all that are there.

    Raises:
        FileNotFoundError: there is no finished split, or a shard is missing.
        ValueError: a shard is damaged; the message names the file and, where known, the samples.
    """
    communicator = communicator or SingleProcess()
    rank, size = communicator.rank, communicator.size

    def check() -> dict[str, int]:
        found = {}
        names = splits or sorted(path.parent.name for path in Path(directory).glob(f"*/{MANIFEST_NAME}"))
        for split in names:
            folder = Path(directory) / split
            manifest = Manifest.load(folder / MANIFEST_NAME)
            for entry in manifest.shards[rank::size]:
                open_shard(folder / entry.file, entry, manifest).verify()
            found[split] = manifest.num_samples
        if not found:
            raise FileNotFoundError(f"{directory} holds no finished data set: there is no */{MANIFEST_NAME}")
        return found

    return succeed_together(communicator, check, "data.verify")
