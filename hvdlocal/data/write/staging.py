"""The directory of a split while it is written: what an earlier run left, shards that wait, and how all appear at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.format.manifest import MANIFEST_NAME, OVERWRITE, Manifest, ShardEntry
from hvdlocal.data.format.shard import open_shard
from hvdlocal.directory import Directory, LinkError, write_text
from hvdlocal.lock import hold

UNFINISHED = ".unfinished"
"""Directory inside the split's, where shards wait until all are there; named as no class of an image tree can be."""

LOCK = ".lock"
"""File inside the split's directory, while it is written."""


@dataclass
class Receipt:
    """Facts of a finished shard, kept beside it as JSON until the manifest is there.

    Attributes:
        entry: the shard.
        counts: what the kind counts in the samples, of which `Kind.combine` makes the statistics of the split.
        bad: [source index, reason] of the samples left out.
        notes: how many samples something was done to, by what it was.
        plan: what the shard is a part of.
    """

    entry: ShardEntry
    counts: Any
    bad: list[list[Any]] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    plan: str = ""

    def save(self, path: Path) -> None:
        """Writes it, whole or not at all."""
        write_text(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Receipt:
        """Reads it back. Raises OSError or ValueError."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**content | {"entry": ShardEntry(**content["entry"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a receipt") from error


class SplitStaging:
    """The files of a split while it is written.

    Any rank may ask for shards and make them; whatever changes the directory as a whole (`claim`, `prepare`, `begin_mending`,
    `publish`, `release`) is rank 0's.

    Args:
        directory: the split's.
        split: its name.
        overwrite: whether another data set that is there is replaced.
    """

    def __init__(self, directory: Path, split: str, overwrite: bool) -> None:
        self.directory = directory
        self.split = split
        self.overwrite = overwrite
        self._unfinished = directory / UNFINISHED
        self._lock: IO[bytes] | None = None

    def claim(self) -> None:
        """Keeps other writers out of the split's directory."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with Directory(self.directory) as directory:
                self._lock = hold(directory, LOCK)
                if directory.exists(UNFINISHED):
                    directory.inner(UNFINISHED).close()
        except BlockingIOError as error:
            raise FileExistsError(
                f"{self.directory} is being written by another process ({error}); wait for it, or choose another directory"
            ) from None
        except LinkError:
            raise
        except OSError:
            pass  # a finished data set may lie where nobody can write; others are told when they begin to

    def release(self) -> None:
        """Lets others in, and leaves no empty directories behind."""
        if self._lock is not None:
            (self.directory / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None
        for directory in (self._unfinished, self.directory):
            try:
                directory.rmdir()
            except OSError:
                continue

    def prepare(self, plan: str, skip_bad: bool) -> Manifest | None:
        """Looks at what is there, and clears what an earlier run left.

        Returns:
            The manifest of the same plan, if it was finished.

        Raises:
            FileExistsError: another data set is there, finished or not, and `overwrite` is not set.
            ValueError: the manifest that is there cannot be used, and `overwrite` is not set.
        """
        self._refuse_strange_shards(plan)
        path = self.directory / MANIFEST_NAME
        existing = None
        if path.exists():
            try:
                existing = Manifest.load(path)
            except ValueError:
                if not self.overwrite:
                    raise
            if existing is not None and existing.plan != plan:
                if not self.overwrite:
                    raise FileExistsError(
                        f"{self.directory} already holds a different data set; choose another directory, or replace it with "
                        f"{OVERWRITE}"
                    )
                existing = None
            if existing is not None and existing.preparation.get("left_out") and not skip_bad:
                existing = None  # finished with --bad skip, it lacks what is wanted now; the bad files may be mended
        foreign = []
        for receipt in self._unfinished.glob("*.json"):
            try:
                if Receipt.load(receipt).plan == plan:
                    continue
            except (ValueError, OSError):
                pass
            foreign.append(receipt)
        if foreign and not self.overwrite:
            shards = f"{len(foreign)} shard{'s' if len(foreign) > 1 else ''}"
            raise FileExistsError(
                f"{self._unfinished} holds {shards} of a different data set that was never finished; finish it with the "
                "options and the source that it was begun with, choose another directory, or replace them with "
                f"{OVERWRITE}"
            )
        if existing is None:
            self._unfinished.mkdir(parents=True, exist_ok=True)
        for receipt in foreign:
            receipt.unlink()
        kept = {receipt.stem for receipt in self._unfinished.glob("*.json")}
        for leftover in self._unfinished.glob("*"):
            if leftover.suffix != ".json" and leftover.name not in kept:
                leftover.unlink()
        return existing

    def _refuse_strange_shards(self, plan: str) -> None:
        """Without a manifest, only the shards of which there are receipts are known to be ours, left half published."""
        if self.overwrite or (self.directory / MANIFEST_NAME).exists():
            return
        for shard in sorted(self.directory.glob(f"{self.split}-?????-of-?????.h5*")):
            try:
                known = Receipt.load(self._unfinished / f"{shard.name}.json").plan == plan
            except (ValueError, OSError):
                known = False
            if not known:
                raise FileExistsError(
                    f"{shard} is there without a {MANIFEST_NAME}; copy the manifest too, choose another directory, or "
                    f"replace it with {OVERWRITE}"
                )

    def begin_mending(self) -> None:
        """Makes room for shards of a finished data set that must be written again."""
        self._unfinished.mkdir(exist_ok=True)

    def finished(self, name: str, draft: Manifest) -> Receipt | None:
        """The receipt of a shard that an earlier run finished, if the shard is whole and what is to be written.

        One that lacks bad samples is not: they may have been mended since, to files of the same size even.
        """
        try:
            receipt = Receipt.load(self._unfinished / f"{name}.json")
            if receipt.plan != draft.plan or receipt.entry.file != name or receipt.bad:
                return None
            # It is in its final place already if the earlier run ended while it published.
            path = self._unfinished / name
            open_shard(path if path.exists() else self.directory / name, receipt.entry, draft).verify()
        except (ValueError, OSError):
            return None
        return receipt

    def make(
        self,
        name: str,
        rows: NDArray[np.int64],
        draft: Manifest,
        write_shard: Callable[[Path, str, NDArray[np.int64]], Receipt],
    ) -> Receipt:
        """Writes a shard, reads it back, and only then gives it its name and its receipt."""
        temporary, path = self._unfinished / f"{name}.tmp", self._unfinished / name
        try:
            try:
                receipt = write_shard(temporary, name, rows)
            except OSError as error:
                if error.errno is not None and error.filename is None:  # from a plain write, which knows no name
                    raise OSError(error.errno, f"{os.strerror(error.errno)} while writing", str(temporary)) from error
                raise
            receipt.plan = draft.plan
            if receipt.entry.num_samples:
                open_shard(temporary, receipt.entry, draft).verify()
                os.replace(temporary, path)
                _sync(self._unfinished)
        finally:
            temporary.unlink(missing_ok=True)
        receipt.save(self._unfinished / f"{name}.json")
        return receipt

    def is_intact(self, manifest: Manifest, number: int) -> bool:
        """Whether a shard of a finished data set is there, and all its checksums agree."""
        try:
            entry = manifest.shards[number]
            open_shard(self.directory / entry.file, entry, manifest).verify()
        except (ValueError, OSError):
            return False
        return True

    def publish(self, manifest: Manifest, changed: bool, mended: bool) -> None:
        """Gives all shards their places and writes the manifest; clears what is not needed any more.

        Args:
            manifest: of the whole split.
            changed: whether any shard was written.
            mended: whether the manifest was there, and only damaged shards were written again.

        Raises:
            FileNotFoundError: a shard was removed or changed by somebody else.
        """
        temporary = self.directory / f"{MANIFEST_NAME}.tmp"
        if changed:
            for shard in manifest.shards:
                waiting, placed = self._unfinished / shard.file, self.directory / shard.file
                place = waiting if waiting.exists() else placed
                if not place.is_file() or place.stat().st_size != shard.bytes:
                    raise FileNotFoundError(
                        f"{waiting} was removed or changed while the data set was written; run again"
                    )
            # The old manifest goes first: from then on until the new one is there, a reader finds no data set instead
            # of a mixed one. The receipts stay, so that a run that is killed here can be finished. A manifest whose
            # shards are mended stays: it means the same content, and tells that the whole shards are ours.
            target = self.directory / MANIFEST_NAME
            if not mended:
                target.unlink(missing_ok=True)
            _sync(self.directory)
            for shard in manifest.shards:
                if (self._unfinished / shard.file).exists():
                    os.replace(self._unfinished / shard.file, self.directory / shard.file)
            _sync(self.directory)
            manifest.save(target)
        temporary.unlink(missing_ok=True)  # of a run that was killed while it mended
        if self.overwrite:  # what is left of a data set with another number of shards would never be read again
            ours = {self.directory / shard.file for shard in manifest.shards}
            for leftover in set(self.directory.glob(f"{self.split}-?????-of-?????.h5*")) - ours:
                leftover.unlink()
        shutil.rmtree(self._unfinished, ignore_errors=True)


def _sync(directory: Path) -> None:
    with Directory(directory) as held:
        held.sync()
