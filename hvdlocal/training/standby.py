"""The records of a rank that may have to go on with metrics.jsonl when the first rank dies."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any, NamedTuple

from hvdlocal.directory import Directory
from hvdlocal.training.metrics import BUFFER_BYTES, METRICS, JsonLines, line_of

OF_EACH_RANK = "steps"
"""The kind of record that each rank writes by its own clock. All others are written by all ranks, in the same order."""


class _Kept(NamedTuple):
    """A record in memory, and the line that it would be."""

    kind: str
    step: int
    line: bytes


class _End(NamedTuple):
    """The last records in a file.

    Attributes:
        records: the kind and the step of each, in their order.
        bytes: where the last whole record ends.
    """

    records: list[tuple[str, int]]
    bytes: int


class Standby:
    """Keeps the records of a rank in memory until the first rank has them in `metrics.jsonl`. See `Metrics`.

    When the first rank dies, the file lacks what that rank had not written out yet. All ranks write the same records in the
    same order, so the file holds the first of them, and the next rank appends the others (`take_over`): none is lost, and none
    is in the file twice. Only the records of kind "steps" are each rank's own. Of these the next rank appends the ones that it
    has written since the last record in the file.

    The rank looks at the end of the file from time to time and forgets what is there. That is safe when a whole node is lost:
    what this rank sees there is on the file server, or in the memory of its own node.

    Args:
        directory: of the file.
        keep: bytes in the file that an earlier start of the run has left.
        room_returns: see `JsonLines`.

    Attributes:
        bytes: of the lines that are kept.
    """

    def __init__(self, directory: Directory, keep: int = 0, room_returns: Callable[[], bool] = lambda: False) -> None:
        self._directory = directory
        self._begin = keep
        self._room_returns = room_returns
        self._kept: list[_Kept] = []
        self.bytes = 0
        self._most_bytes = BUFFER_BYTES
        self._file: JsonLines | None = None

    def take_over(self) -> None:
        """Opens the file on the rank that is the first one now, and appends what is missing; a second call does nothing.

        The process that wrote the file before has ended, or it could still write to it: take the directory's lock first.

        Raises:
            OSError: the file cannot be read or written; the message names it.
        """
        if self._file is not None:
            return
        with self._directory.open_to_append(METRICS) as file:
            end = self._end_of(file)
        self._file = JsonLines(self._directory, end.bytes, self._room_returns)
        for one in _missing(self._kept, end.records):
            self._file.append(one.line)
        self._file.flush()
        self._kept.clear()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """See `Metrics`."""
        if self._file is not None:
            self._file.write(kind, step, **values)
            return
        line = line_of(kind, step, values)
        self._kept.append(_Kept(kind, step, line))
        self.bytes += len(line)
        if self.bytes > self._most_bytes:
            with suppress(OSError):  # the first rank reports it when it concerns the run
                self._forget()

    def flush(self) -> None:
        """See `Metrics`."""
        if self._file is not None:
            self._file.flush()

    def position(self) -> int:
        """See `Metrics`. Returns 0 on a rank that is not the first."""
        return 0 if self._file is None else self._file.position()

    def close(self) -> None:
        """See `Metrics`."""
        self._kept.clear()
        if self._file is not None:
            self._file.close()

    def _forget(self) -> None:
        """Forgets what is in the file: whole steps, since a second record of a kind and a step may follow."""
        with self._directory.open_to_read(METRICS) as file:
            missing = _missing(self._kept, self._end_of(file).records)
        first = missing[0].step if missing else self._kept[-1].step
        self._kept = [one for one in self._kept if one.step >= first]
        self.bytes = sum(len(one.line) for one in self._kept)
        # What is read here should not grow faster than what is written.
        self._most_bytes = max(BUFFER_BYTES, 2 * self.bytes)

    def _end_of(self, file: IO[bytes]) -> _End:
        """Returns all records in the file of the steps that are kept here, perhaps with some before these."""
        size = file.seek(0, 2)
        length = BUFFER_BYTES
        while True:
            begin = max(size - length, min(self._begin, size))
            file.seek(begin)
            end = _read(begin, file.read(size - begin), whole=begin <= self._begin)
            enough = end.records and (not self._kept or end.records[0][1] < self._kept[0].step)
            if enough or begin <= self._begin:
                return end
            length *= 2


def _read(begin: int, text: bytes, whole: bool) -> _End:
    """Returns the records in a part of a file.

    It ends at a line that is no record: the process that wrote it died, or its node did with the lines before it in memory.

    Args:
        begin: where the part begins, in bytes.
        text: the part.
        whole: whether it begins with a record; otherwise perhaps inside of one.
    """
    first = 0 if whole else text.find(b"\n") + 1
    records: list[tuple[str, int]] = []
    end = begin + first
    for line in text[first:].splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            records.append((str(record["kind"]), int(record["step"])))
        except (ValueError, KeyError, TypeError):
            break
        end += len(line)
    return _End(records, end)


def _missing(kept: Sequence[_Kept], written: Sequence[tuple[str, int]]) -> list[_Kept]:
    """Returns the records that are not in a file.

    Args:
        kept: records of this rank, in their order.
        written: the kind and the step of those in the file, which include all that are as late as the first of `kept`.
    """
    common = Counter(one for one in written if one[0] != OF_EACH_RANK)
    begin = 0
    for i, one in enumerate(kept):
        if common[one.kind, one.step]:
            common[one.kind, one.step] -= 1
            begin = i + 1
    last = max((step for kind, step in written if kind == OF_EACH_RANK), default=-1)
    return [one for one in kept[begin:] if one.kind != OF_EACH_RANK or one.step > last]
