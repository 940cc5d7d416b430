"""Writing a split of JPEG files as HDF5 shards."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvdlocal.communicator import succeed_together
from hvdlocal.data.format.manifest import Manifest, ShardEntry
from hvdlocal.data.write.jpeg_check import check_jpeg, jpeg_libraries, jpeg_versions
from hvdlocal.data.write.labelled_writer import LabelledWriter
from hvdlocal.data.write.shard_writer import write_shard
from hvdlocal.data.write.staging import Receipt

_ERRORS_OF_A_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EIO}


@dataclass(frozen=True)
class JpegSample:
    """A JPEG file for a shard.

    Attributes:
        data: its content; a grayscale or RGB file, baseline or progressive.
        note: what was done to the original, if anything ("converted from PNG"); the manifest counts equal notes.
    """

    data: bytes
    note: str = ""


class JpegSource(Protocol):
    """N JPEG files, read one at a time, from several threads."""

    def __len__(self) -> int:
        """The number of files, N."""

    def __getitem__(self, index: int, /) -> JpegSample | bytes:
        """File `index`. Raises ValueError with the reason if it cannot be used, OSError if it cannot be read.

        An OSError that is about this file alone (missing, not permitted, unreadable) makes it a bad one; any other ends
        the writing.
        """


class JpegShardWriter(LabelledWriter):
    """Writes one split of a data set of JPEG files as HDF5 shards, laid out as by `ShardWriter`.

    The bytes of the files are stored as they are. Every file is decoded once, in full, so that a damaged one is found
    now; the mean and standard deviation in the manifest are those of all decoded pixels, as RGB.

    Args:
        directory: as in `ShardWriter`, like all that is not named here.
        split: name of the split.
        skip_bad: leave out files that cannot be used, instead of refusing the whole once all have been tried.
        threads: decoding threads; by default this rank's share of the cores.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str,
        *,
        skip_bad: bool = False,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(directory, split, **options)
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; there must be at least one")
        self.skip_bad = skip_bad
        self.threads = threads or _own_cores(self._communicator.local_size)

    def write(
        self,
        files: JpegSource,
        labels: ArrayLike,
        *,
        names: Sequence[str] | None = None,
        identity: str | None = None,
        preparation: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Writes the split and returns its manifest; as `ShardWriter.write`, restartable in the same way.

        Args:
            files: N JPEG files; those of one shard are in memory at a time.
            labels: integers (N,) in 0..len(classes)-1.
            names: N strings by which messages call the files.
            identity: what identifies the content of `files`; by default a hash of all of it, for which they are read
                once more.
            preparation: facts that the manifest shall record; the versions of the decoders are added.

        Raises:
            BadSamplesError: some files cannot be used, and `skip_bad` is not set. All have been tried, and
                bad_files.txt lists them.
            ValueError, FileExistsError: as `ShardWriter.write`.
        """

        def check() -> tuple[NDArray[np.int32], str]:
            jpeg_libraries()
            return self._check_labels(labels, len(files), "files"), identity or _sha256_of_files(files)

        label_array, source = succeed_together(self._communicator, check, "data.check")
        draft = self._labelled_draft("jpeg", None, label_array, source)

        def write(path: Path, name: str, rows: NDArray[np.int64]) -> Receipt:
            contents, kept, dims, bad = [], [], [], []
            notes: dict[str, int] = {}
            histogram = np.zeros((3, 256), np.int64)

            def load(row: int) -> tuple[JpegSample, tuple[int, int], NDArray[np.int64]] | str:
                try:
                    sample = _as_sample(files[row])
                    facts = check_jpeg(sample.data)
                except (ValueError, OSError) as error:
                    line = f"{names[row] if names else f'sample {row}'} {_why_bad(error)}"
                    return line.encode(errors="backslashreplace").decode()  # names of files need not be UTF-8
                if facts.lenient and not sample.note:
                    sample = JpegSample(sample.data, "decoded leniently")
                return sample, (facts.height, facts.width), facts.histogram

            for row, loaded in zip(rows.tolist(), self._in_threads(load, rows.tolist()), strict=True):
                self._tell(1)
                if isinstance(loaded, str):
                    bad.append([row, loaded])
                    continue
                sample, size, counts = loaded
                histogram += counts
                contents.append(sample.data)
                kept.append(row)
                dims.append(size)
                if sample.note:
                    notes[sample.note] = notes.get(sample.note, 0) + 1
            if not kept:
                return Receipt(ShardEntry(name, 0, 0, ""), histogram.tolist(), bad, notes)
            index = np.array(kept, np.int64)
            tables = {
                "offsets": np.cumsum([0] + [len(content) for content in contents]),
                "dims": np.array(dims, np.uint16),
                "labels": label_array[index],
                "index": index,
            }
            sha256 = write_shard(path, draft, len(index), [contents], tables)
            entry = ShardEntry(name, len(index), path.stat().st_size, sha256)
            return Receipt(entry, histogram.tolist(), bad, notes)

        facts = {**(preparation or {}), **jpeg_versions()}
        return self._write_split(draft, len(label_array), write, facts, self.skip_bad)

    def _in_threads(self, work: Callable[[int], Any], rows: Sequence[int]) -> Iterator[Any]:
        """The results of `work` for all rows, in their order."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="data-prep")
        try:
            yield from pool.map(work, rows)
        finally:
            pool.shutdown(cancel_futures=True)


def _why_bad(error: ValueError | OSError) -> str:
    """Why a file cannot be used; raises the error again if another file would have met the same one."""
    if isinstance(error, ValueError):
        return str(error)
    if error.errno not in _ERRORS_OF_A_FILE:
        raise error
    return f"cannot be read ({error.strerror})"


def _as_sample(sample: JpegSample | bytes) -> JpegSample:
    return sample if isinstance(sample, JpegSample) else JpegSample(sample)


def _sha256_of_files(files: JpegSource) -> str:
    digest = hashlib.sha256()
    for index in range(len(files)):
        try:
            content = _as_sample(files[index]).data
        except (ValueError, OSError) as error:
            content = _why_bad(error).encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _own_cores(local_size: int) -> int:
    """Cores that this rank may use, divided among the node's ranks unless the launcher has bound it to some."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // local_size if cores == os.cpu_count() else cores)
