"""The record of a run: one JSON object a line, written by rank 0."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol


class Metrics(Protocol):
    """Where records go."""

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Adds one record of a kind ("steps", "round", "evaluation" …) at an optimizer step."""

    def flush(self) -> None:
        """Hands to the system what was written."""

    def position(self) -> int:
        """Bytes written so far, all of them on disk: where to go on after an interruption."""

    def close(self) -> None:
        """Ends the record."""


class NoMetrics:
    """For all ranks but the first."""

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def position(self) -> int:
        """0."""
        return 0

    def close(self) -> None:
        """Nothing."""


class JsonLines:
    """`metrics.jsonl`, the source of truth: strict JSON (NaN and infinity become null), in the order of writing.

    Args:
        path: of the file.
        keep: bytes of an earlier attempt to keep; what it wrote after its last checkpoint is written again.

    Raises:
        OSError: the file cannot be written, from any method; the message names it.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self._file = path.open("ab")
        self._file.truncate(_end_of_records(path, keep))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """See `Metrics`."""
        record = {"kind": kind, "step": step, **{name: _strict(value) for name, value in values.items()}}
        with self._named():
            self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")

    def flush(self) -> None:
        """See `Metrics`."""
        with self._named():
            self._file.flush()

    def position(self) -> int:
        """See `Metrics`."""
        with self._named():
            self._file.flush()
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """See `Metrics`."""
        with self._named():
            self._file.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error


class TensorBoard:
    """The same numbers as TensorBoard scalars, beside another record."""

    def __init__(self, directory: Path, other: Metrics, first_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("tensorboard=true needs TensorBoard: pip install hvdlocal[tensorboard]") from error
        self._writer = SummaryWriter(str(directory), purge_step=first_step)
        self._other = other

    def write(self, kind: str, step: int, **values: Any) -> None:
        """See `Metrics`."""
        self._other.write(kind, step, **values)
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """See `Metrics`."""
        self._other.flush()
        self._writer.flush()

    def position(self) -> int:
        """See `Metrics`."""
        return self._other.position()

    def close(self) -> None:
        """See `Metrics`."""
        self._other.close()
        self._writer.close()


def _end_of_records(path: Path, keep: int) -> int:
    """`keep`, or less when the file has lost so much: then to the end of its last whole record."""
    if path.stat().st_size >= keep:
        return keep
    return path.read_bytes().rfind(b"\n") + 1


def _strict(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
