"""Opening the files of a data set, shared out over the ranks that read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from hvdlocal.communicator.agreement import require_agreement, succeed_together
from hvdlocal.communicator.base import Communicator
from hvdlocal.data.format.manifest import MANIFEST_NAME, Manifest
from hvdlocal.data.format.shard import Shard, open_shard

S = TypeVar("S")
T = TypeVar("T")


def open_shards(folder: Path, communicator: Communicator, settings: tuple[str, str]) -> tuple[Manifest, list[Shard]]:
    """Opens the shards of a split; a collective.

    Args:
        folder: the split's directory, on this rank's node.
        communicator: the ranks that read the split.
        settings: storage and share, which must be the same on all ranks.

    Raises:
        FileNotFoundError, ValueError, SetupError: see `ShardedDataset`.
        DisagreementError: the ranks see different data or settings.
    """
    path = folder / MANIFEST_NAME
    manifest = succeed_together(communicator, lambda: Manifest.load(path), "hvdlocal.data.manifest")
    facts = {"the data set's fingerprint": manifest.fingerprint, "storage": settings[0], "share": settings[1]}
    require_agreement(communicator, facts, "hvdlocal.data.agreement")
    shards = open_each(manifest.shards, lambda entry: open_shard(folder / entry.file, entry, manifest), communicator)
    # Each node may have the data set in a folder of its own.
    paths = [folder / entry.file for entry in manifest.shards]
    return manifest, [shard.at(path) for shard, path in zip(shards, paths, strict=True)]


def open_each(items: Sequence[T], open_one: Callable[[T], S], communicator: Communicator) -> list[S]:
    """What `open_one` finds in each item; a collective in which every item is opened by one rank."""
    rank, size = communicator.rank, communicator.size
    mine = succeed_together(
        communicator, lambda: [open_one(item) for item in items[rank::size]], "hvdlocal.data.shards"
    )
    everyone = communicator.gather(mine, "hvdlocal.data.opened_shards")
    return [everyone[number % size][number // size] for number in range(len(items))]
