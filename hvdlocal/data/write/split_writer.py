"""What is common to writers of a split: who writes which shard, what an earlier run left, and when the manifest appears."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvdlocal.communicator import Communicator, SingleProcess, on_rank_zero, require_agreement, succeed_together
from hvdlocal.data.format.labels import class_numbers, labels_sha256
from hvdlocal.data.format.manifest import (
    MANIFEST_NAME,
    OVERWRITE,
    Manifest,
    ShardEntry,
    sha256_of_json,
    shard_name,
    split_directory,
)
from hvdlocal.data.format.pixel_statistics import mean_and_std
from hvdlocal.data.format.shard import open_shard
from hvdlocal.data.permutations import pre_shuffle
from hvdlocal.directory import Directory, LinkError, write_text
from hvdlocal.lock import hold

UNFINISHED = ".unfinished"
"""Directory inside the split's, where shards wait until all are there; named as no class of an image tree can be."""

LOCK = ".lock"
"""File inside the split's directory, while it is written."""

BAD_FILES = "bad_files.txt"
"""Report inside the split's directory: one line per sample that could not be used."""

Progress = Callable[[int], None]
"""Told of every few samples that are done, by their number."""


class BadSamplesError(ValueError):
    """Some samples cannot be used; raised after all have been tried.

    Attributes:
        lines: one sentence per bad sample.
        report: the file that lists them.
    """

    def __init__(self, lines: Sequence[str], report: Path, num_samples: int) -> None:
        self.lines = list(lines)
        self.report = report
        first = "; ".join(self.lines[:3]) + ("; …" if len(self.lines) > 3 else "")
        super().__init__(
            f"{len(self.lines)} of {num_samples} samples cannot be used ({first}); {report} lists them all; mend or "
            f"remove them and write again with {OVERWRITE}, or leave them out with --bad skip (from Python: skip_bad=True)"
        )


@dataclass
class Receipt:
    """What is known of a finished shard: kept beside it as JSON until the manifest is there.

    Attributes:
        entry: the shard.
        histogram: per channel, how often each pixel value occurs.
        bad: [source index, reason] of the samples left out.
        notes: how many samples something was done to, by what it was.
        plan: what the shard is a part of.
    """

    entry: ShardEntry
    histogram: list[list[int]]
    bad: list[list[Any]] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    plan: str = ""

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_text(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Receipt":
        """Read it back. Raises OSError or ValueError."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**content | {"entry": ShardEntry(**content["entry"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a receipt") from error


class SplitWriter:
    """The part of a writer that does not know what a sample is.

    Args:
        directory: where the data set lives; created if need be.
        split: name of the split, e.g. "train".
        classes: class names; label i means classes[i].
        num_shards: number of files. It has nothing to do with the number of ranks; some 256 MiB to 1 GiB a file is
            good.
        seed: seed of the pre-shuffle.
        overwrite: replace a different data set that is already there.
        communicator: ranks that write together, each some of the shards; every rank makes the same calls. The files
            are the same bytes for any number of ranks. None for this process alone.
        progress: called on rank 0 with the number of samples written since the last call.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str,
        *,
        classes: Sequence[str],
        num_shards: int = 1,
        seed: int = 0,
        overwrite: bool = False,
        communicator: Communicator | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not classes or isinstance(classes, str) or len(set(classes)) != len(classes):
            raise ValueError(f"classes {classes!r} must be a list of at least one name, each of them once")
        if num_shards < 1:
            raise ValueError(f"num_shards is {num_shards}; there must be at least one shard")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed} is out of range; choose an integer from 0 to 2**63 - 1")
        self.directory = split_directory(directory, split)
        self.split = split
        self.classes = tuple(classes)
        self.num_shards = num_shards
        self.seed = seed
        self.overwrite = overwrite
        self._communicator = communicator or SingleProcess()
        self._progress = progress
        self._unfinished = self.directory / UNFINISHED
        self._lock: IO[bytes] | None = None

    def _check_labels(self, labels: ArrayLike, n: int, things: str) -> NDArray[np.int32]:
        if n < self.num_shards:
            raise ValueError(f"{n} {things} cannot fill {self.num_shards} shards; choose a smaller num_shards")
        try:
            array = class_numbers(np.asarray(labels), n, things)
        except ValueError as error:
            raise ValueError(f"labels are {error}") from None
        out_of_range = np.flatnonzero((array < 0) | (array >= len(self.classes)))
        if len(out_of_range):
            first = int(out_of_range[0])
            raise ValueError(
                f"label {array[first]} of sample {first} is out of range; "
                f"{len(self.classes)} classes take labels 0..{len(self.classes) - 1}"
            )
        return array.astype(np.int32)

    def _write_split(
        self,
        identity: str,
        shape: tuple[int, int, int] | None,
        labels: NDArray[np.int32],
        write_shard: Callable[[Path, str, NDArray[np.int64]], Receipt],
        preparation: Mapping[str, Any],
        skip_bad: bool = False,
    ) -> Manifest:
        """Write what is not there yet and publish the split; a collective.

        Args:
            identity: identifies the content of the source.
            shape: as in the manifest.
            labels: int32 (N,).
            write_shard: writes the samples of the given source indices to a path under which it is not read yet; the
                name is what the entry must say.
            preparation: as in the manifest.
            skip_bad: whether bad samples are left out; otherwise they are refused once all have been tried.
        """
        plan = sha256_of_json(
            {
                "split": self.split,
                "shape": shape,
                "classes": self.classes,
                "seed": self.seed,
                "num_shards": self.num_shards,
                "labels": labels_sha256(labels),
                "source": identity,
            }
        )
        require_agreement(self._communicator, {"the plan of the data set": plan}, "data.plan")
        on_rank_zero(self._communicator, self._claim, "data.claim")
        try:
            return self._write_claimed(plan, shape, labels, write_shard, preparation, skip_bad)
        finally:
            self._release()

    def _write_claimed(
        self,
        plan: str,
        shape: tuple[int, int, int] | None,
        labels: NDArray[np.int32],
        write_shard: Callable[[Path, str, NDArray[np.int64]], Receipt],
        preparation: Mapping[str, Any],
        skip_bad: bool,
    ) -> Manifest:
        n, communicator = len(labels), self._communicator
        draft = Manifest(
            self.split, shape, self.classes, self.seed, (), (), (), "jpeg" if shape is None else "images", {}, plan
        )
        order = pre_shuffle(self.seed, n)
        bounds = [n * i // self.num_shards for i in range(self.num_shards + 1)]
        rows = [order[bounds[number] : bounds[number + 1]] for number in range(self.num_shards)]

        existing = on_rank_zero(communicator, lambda: self._prepare(plan, skip_bad), "data.prepare")
        if existing is not None:
            intact = self._each(range(self.num_shards), lambda number: self._is_intact(existing, number))
            damaged = [number for number, whole in enumerate(intact) if not whole]
            if damaged:
                on_rank_zero(communicator, lambda: self._unfinished.mkdir(exist_ok=True), "data.mend")
        else:
            damaged = list(range(self.num_shards))

        def make(number: int) -> Receipt:
            return self._finished(number, rows[number], labels, draft) or self._make(
                number, rows[number], draft, write_shard
            )

        receipts = self._each(damaged, make, [len(rows[number]) for number in damaged])
        if existing is not None:
            manifest = self._mended(existing, dict(zip(damaged, receipts, strict=True)))
        else:
            bad = sorted((index, reason) for receipt in receipts for index, reason in receipt.bad)
            self._report([reason for _, reason in bad], n, skip_bad)
            manifest = self._manifest(draft, receipts, preparation)
        on_rank_zero(
            communicator,
            lambda: self._publish(manifest, changed=bool(damaged), mended=existing is not None),
            "data.publish",
        )
        return manifest

    def _each(
        self, numbers: Sequence[int], work: Callable[[int], Any], samples: Sequence[int] | None = None
    ) -> list[Any]:
        """The results of ``work`` for all numbers, in their order, on all ranks, which share it out; a collective.

        One number per rank and round: no rank waits long for another, and a failure anywhere ends all soon.

        Args:
            samples: how many samples each number stands for, for the progress. Rank 0 tells of its own as it works.
        """
        rank, size = self._communicator.rank, self._communicator.size
        results: list[Any] = []
        for start in range(0, len(numbers), size):
            round_ = numbers[start : start + size]
            mine = round_[rank] if rank < len(round_) else None
            result = succeed_together(
                self._communicator,
                lambda mine=mine: None if mine is None else work(mine),  # type: ignore[misc]
                "data.shard",
            )
            results += self._communicator.gather(result, "data.receipts")[: len(round_)]
            if samples is not None:
                self._tell(sum(samples[start + 1 : start + len(round_)]))
        return results

    def _tell(self, samples: int) -> None:
        if self._progress and self._communicator.rank == 0:
            self._progress(samples)

    def _prepare(self, plan: str, skip_bad: bool) -> Manifest | None:
        """Look at what is there, and clear what an earlier run left. Returns the finished manifest of the same plan."""
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
                    raise self._refusal()
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

    def _finished(
        self, number: int, rows: NDArray[np.int64], labels: NDArray[np.int32], draft: Manifest
    ) -> Receipt | None:
        """The receipt of a shard that an earlier run finished, if the shard is whole and what is to be written.

        One that lacks bad samples is not: they may have been mended since, to files of the same size even.
        """
        name = shard_name(self.split, number, self.num_shards)
        try:
            receipt = Receipt.load(self._unfinished / f"{name}.json")
            if receipt.plan != draft.plan or receipt.entry.file != name or receipt.bad:
                return None
            # It is in its final place already if the earlier run ended while it published.
            path = self._unfinished / name
            shard = open_shard(path if path.exists() else self.directory / name, receipt.entry, draft)
            if not (np.array_equal(shard.index, rows) and np.array_equal(shard.labels, labels[rows])):
                return None
            shard.verify()
        except (ValueError, OSError):
            return None
        self._tell(len(rows))
        return receipt

    def _make(
        self,
        number: int,
        rows: NDArray[np.int64],
        draft: Manifest,
        write_shard: Callable[[Path, str, NDArray[np.int64]], Receipt],
    ) -> Receipt:
        """Write a shard, read it back, and only then give it its name and its receipt."""
        name = shard_name(self.split, number, self.num_shards)
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

    def _report(self, lines: Sequence[str], n: int, skip_bad: bool) -> None:
        """List the bad samples in a file, and refuse them unless they are to be left out; a collective."""
        path = self.directory / BAD_FILES

        def write() -> None:
            if lines:
                write_text(path, "".join(f"{line}\n" for line in lines))
            else:
                path.unlink(missing_ok=True)

        on_rank_zero(self._communicator, write, "data.report")
        if lines and not skip_bad:
            raise BadSamplesError(lines, path, n)

    def _manifest(self, draft: Manifest, receipts: Sequence[Receipt], preparation: Mapping[str, Any]) -> Manifest:
        for number, receipt in enumerate(receipts):
            if not receipt.entry.num_samples:
                raise ValueError(f"no sample of shard {number} can be used; choose fewer shards")
        mean, std = mean_and_std(np.sum([receipt.histogram for receipt in receipts], axis=0))
        notes: dict[str, int] = {}
        for receipt in receipts:
            for note, count in receipt.notes.items():
                notes[note] = notes.get(note, 0) + count
        left_out = sum(len(receipt.bad) for receipt in receipts)
        facts = {**preparation, "left_out": left_out, "notes": dict(sorted(notes.items()))}
        entries = tuple(receipt.entry for receipt in receipts)
        return replace(draft, mean=mean, std=std, shards=entries, preparation=facts)

    def _mended(self, existing: Manifest, receipts: Mapping[int, Receipt]) -> Manifest:
        """The existing manifest with the shards that had to be written again, which must have the content of before."""
        entries = list(existing.shards)
        for number, receipt in receipts.items():
            if (receipt.entry.num_samples, receipt.entry.sha256) != (
                entries[number].num_samples,
                entries[number].sha256,
            ):
                raise FileExistsError(
                    f"{self.directory} holds a damaged data set, and its source has changed since; remove the directory "
                    "and write the data set again"
                )
            entries[number] = receipt.entry
        return replace(existing, shards=tuple(entries))

    def _publish(self, manifest: Manifest, changed: bool, mended: bool) -> None:
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

    def _claim(self) -> None:
        """Keeps other writers out of the split's directory; rank 0 only."""
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

    def _release(self) -> None:
        """Lets others in, and leaves no empty directories behind."""
        if self._communicator.rank != 0:
            return
        if self._lock is not None:
            (self.directory / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None
        for directory in (self._unfinished, self.directory):
            try:
                directory.rmdir()
            except OSError:
                continue

    def _is_intact(self, manifest: Manifest, number: int) -> bool:
        try:
            entry = manifest.shards[number]
            open_shard(self.directory / entry.file, entry, manifest).verify()
        except (ValueError, OSError):
            return False
        return True

    def _refusal(self) -> FileExistsError:
        return FileExistsError(
            f"{self.directory} already holds a different data set; choose another directory, or replace it with {OVERWRITE}"
        )


def _sync(directory: Path) -> None:
    with Directory(directory) as held:
        held.sync()
