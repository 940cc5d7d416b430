"""What the writers of a split have in common: which rank writes which shard, and what the manifest says of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdlocal.communicator import Communicator, SingleProcess, on_rank_zero, require_agreement, succeed_together
from hvdlocal.data.format.manifest import OVERWRITE, Manifest, sha256_of_json, shard_name, split_directory
from hvdlocal.data.kinds import KINDS
from hvdlocal.data.permutations import pre_shuffle
from hvdlocal.data.write.staging import Receipt, SplitStaging
from hvdlocal.directory import write_text

BAD_FILES = "bad_files.txt"
"""Report inside the split's directory: one line per sample that could not be used."""

Progress = Callable[[int], None]
"""Called every few samples with the number of samples done since the last call."""


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


class SplitWriter:
    """The part of a writer that does not depend on what a sample is.

    Args:
        directory: where the data set lives; created if need be.
        split: name of the split, e.g. "train".
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
        num_shards: int = 1,
        seed: int = 0,
        overwrite: bool = False,
        communicator: Communicator | None = None,
        progress: Progress | None = None,
    ) -> None:
        if num_shards < 1:
            raise ValueError(f"num_shards is {num_shards}; there must be at least one shard")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed} is out of range; choose an integer from 0 to 2**63 - 1")
        self.directory = split_directory(directory, split)
        self.split = split
        self.num_shards = num_shards
        self.seed = seed
        self.overwrite = overwrite
        self._communicator = communicator or SingleProcess()
        self._progress = progress
        self._staging = SplitStaging(self.directory, split, overwrite)

    def _draft(self, kind: str, facts: Mapping[str, Any], source: Mapping[str, Any]) -> Manifest:
        """The manifest as far as it is known before the first sample is read.

        Args:
            kind: of the samples.
            facts: as in the manifest.
            source: identifies the content of the source.
        """
        plan = {"split": self.split, "seed": self.seed, "num_shards": self.num_shards, **facts, **source}
        return Manifest(self.split, kind, facts, self.seed, plan=sha256_of_json(plan))

    def _write_split(
        self,
        draft: Manifest,
        samples: int,
        write_shard: Callable[[Path, str, NDArray[np.int64]], Receipt],
        preparation: Mapping[str, Any],
        skip_bad: bool = False,
    ) -> Manifest:
        """Writes what is not there yet and publishes the split; a collective.

        Args:
            draft: see `_draft`.
            samples: N, the number of samples of the source, at least one for each shard.
            write_shard: writes the samples of the given source indices to a path under which it is not read yet; the
                name is what the entry must say.
            preparation: as in the manifest.
            skip_bad: whether bad samples are left out; otherwise they are refused once all have been tried.
        """
        require_agreement(self._communicator, {"the plan of the data set": draft.plan}, "data.plan")
        with self._claimed():
            return self._write_claimed(draft, samples, write_shard, preparation, skip_bad)

    def _require_samples(self, samples: int, things: str) -> None:
        if samples < self.num_shards:
            raise ValueError(f"{samples} {things} cannot fill {self.num_shards} shards; choose a smaller num_shards")

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """Keeps other writers out of the split's directory; begins with a collective."""
        on_rank_zero(self._communicator, self._staging.claim, "data.claim")
        try:
            yield
        finally:
            if self._communicator.rank == 0:
                self._staging.release()

    def _write_claimed(
        self,
        draft: Manifest,
        n: int,
        write_shard: Callable[[Path, str, NDArray[np.int64]], Receipt],
        preparation: Mapping[str, Any],
        skip_bad: bool,
    ) -> Manifest:
        communicator, staging = self._communicator, self._staging
        names = [shard_name(self.split, number, self.num_shards) for number in range(self.num_shards)]
        order = pre_shuffle(self.seed, n) if KINDS[draft.kind].shuffled else np.arange(n)
        bounds = [n * i // self.num_shards for i in range(self.num_shards + 1)]
        rows = [order[bounds[number] : bounds[number + 1]] for number in range(self.num_shards)]

        existing = on_rank_zero(communicator, lambda: staging.prepare(draft.plan, skip_bad), "data.prepare")
        if existing is not None:
            intact = self._each(range(self.num_shards), lambda number: staging.is_intact(existing, number))
            damaged = [number for number, whole in enumerate(intact) if not whole]
            if damaged:
                on_rank_zero(communicator, staging.begin_mending, "data.mend")
        else:
            damaged = list(range(self.num_shards))

        def make(number: int) -> Receipt:
            receipt = staging.finished(names[number], draft)
            if receipt is None:
                return staging.make(names[number], rows[number], draft, write_shard)
            self._tell(len(rows[number]))
            return receipt

        receipts = self._each(damaged, make, [len(rows[number]) for number in damaged])
        if existing is not None:
            manifest = self._mended(existing, dict(zip(damaged, receipts, strict=True)))
        else:
            bad = sorted((index, reason) for receipt in receipts for index, reason in receipt.bad)
            self._report([reason for _, reason in bad], n, skip_bad)
            manifest = self._manifest(draft, receipts, preparation)
        on_rank_zero(
            communicator,
            lambda: staging.publish(manifest, changed=bool(damaged), mended=existing is not None),
            "data.publish",
        )
        return manifest

    def _each(
        self, numbers: Sequence[int], work: Callable[[int], Any], samples: Sequence[int] | None = None
    ) -> list[Any]:
        """The results of `work` for all numbers, in their order, on all ranks, which share it out; a collective.

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

    def _report(self, lines: Sequence[str], n: int, skip_bad: bool) -> None:
        """Lists the bad samples in a file, and refuses them unless they are to be left out; a collective."""
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
        statistics = KINDS[draft.kind].combine([receipt.counts for receipt in receipts])
        notes: dict[str, int] = {}
        for receipt in receipts:
            for note, count in receipt.notes.items():
                notes[note] = notes.get(note, 0) + count
        left_out = sum(len(receipt.bad) for receipt in receipts)
        facts = {**preparation, "left_out": left_out, "notes": dict(sorted(notes.items()))}
        entries = tuple(receipt.entry for receipt in receipts)
        return replace(draft, statistics=statistics, shards=entries, preparation=facts)

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
