"""The record of a run, one JSON object a line, written by rank 0; and the means that go into it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any, Protocol

import torch

from hvdlocal.directory import NO_ROOM, Directory
from hvdlocal.terminal import warn

METRICS = "metrics.jsonl"

BUFFER_BYTES = 2**16
"""The most memory that records take while they wait for the next `flush`."""


class Metrics(Protocol):
    """A place to which records are written."""

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Adds one record of a kind ("steps", "round", "evaluation" …) at an optimizer step."""

    def flush(self) -> None:
        """Hands all records to the operating system."""

    def position(self) -> int:
        """Brings all records to disk and returns their bytes so far: where to continue after an interruption."""

    def close(self) -> None:
        """Writes what is left and closes the record."""


class NoMetrics:
    """Writes nothing; for all ranks but the first, unless these may have to take its place (`Standby`)."""

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def position(self) -> int:
        """Returns 0."""
        return 0

    def close(self) -> None:
        """Does nothing."""


class JsonLines:
    """`metrics.jsonl`, the source of truth: strict JSON (NaN and infinity become null), in the order of writing.

    Args:
        directory: of the file.
        keep: bytes of an earlier attempt to keep; what it wrote after its last checkpoint is written again.
        room_returns: returns whether something else of this run, such as a checkpoint that is being written, will free room on
            the disk. Until then, records that find no room wait in memory.

    Raises:
        OSError: the file cannot be written, from any method; the message names it.
    """

    def __init__(self, directory: Directory, keep: int = 0, room_returns: Callable[[], bool] = lambda: False) -> None:
        self._path = directory.path / METRICS
        self._room_returns = room_returns
        self._waiting = bytearray()
        self._file = directory.open_to_append(METRICS)
        with self._named():
            if (size := os.fstat(self._file.fileno()).st_size) < keep:
                warn(f"{self._path} has lost {keep - size} bytes that were in it at the checkpoint")
            self._file.truncate(_end_of_records(self._file, keep))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """See `Metrics`."""
        self.append(line_of(kind, step, values))

    def append(self, line: bytes) -> None:
        """Adds a record that is a line already (`line_of`)."""
        self._waiting += line
        if len(self._waiting) > BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """See `Metrics`."""
        with self._named():
            self._write_out()

    def position(self) -> int:
        """See `Metrics`."""
        with self._named():
            while not self._write_out():  # no checkpoint is open here, so only the thread takes room
                time.sleep(0.01)
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """See `Metrics`."""
        with self._named():
            try:
                self._write_out(patient=False)
            finally:
                self._waiting.clear()
                self._file.close()

    def _write_out(self, patient: bool = True) -> bool:
        """Hands waiting records to the operating system; returns whether there was room for all of them."""
        while self._waiting:
            room_returns = patient and self._room_returns()  # asked first: the room may come back in between
            try:
                written = self._file.write(self._waiting)
            except OSError as error:
                if error.errno in NO_ROOM and room_returns:
                    return False
                raise
            del self._waiting[: written or 0]
        return True

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


class Forwarded:
    """Writes records to another place, and hands each to a function as well.

    Args:
        other: the place.
        receive: is called with kind, step and values.
    """

    def __init__(self, other: Metrics, receive: Callable[[str, int, dict[str, Any]], None]) -> None:
        self._other = other
        self._receive = receive

    def write(self, kind: str, step: int, **values: Any) -> None:
        """See `Metrics`."""
        self._other.write(kind, step, **values)
        self._receive(kind, step, values)

    def flush(self) -> None:
        """See `Metrics`."""
        self._other.flush()

    def position(self) -> int:
        """See `Metrics`."""
        return self._other.position()

    def close(self) -> None:
        """See `Metrics`."""
        self._other.close()


class TrainingMeter:
    """Means of this rank's training losses and metrics since the last line of the log.

    Args:
        device: of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loss = torch.zeros((), dtype=torch.float32, device=device)
        self._metrics: dict[str, tuple[torch.Tensor, torch.Tensor | float]] = {}
        self.micro_batches = 0

    @torch.no_grad()
    def add(self, loss: torch.Tensor, metrics: Mapping[str, tuple[torch.Tensor | float, torch.Tensor | float]]) -> None:
        """Adds one micro-batch, without waiting for its device.

        Args:
            loss: the mean loss of the micro-batch.
            metrics: sums and counts by name.
        """
        self._loss += loss.detach().float()
        for name, (total, count) in metrics.items():
            if name not in self._metrics:
                self._metrics[name] = torch.zeros((), dtype=torch.float64, device=self._device), 0
            so_far, counted = self._metrics[name]
            so_far += total
            self._metrics[name] = so_far, counted + count
        self.micro_batches += 1

    def take(self) -> dict[str, float | None]:
        """Returns the mean loss and the metrics by name, and starts again; a metric that counted nothing is None."""
        means: dict[str, float | None] = {"loss": self._loss.item() / self.micro_batches}
        for name, (total, count) in self._metrics.items():
            means[name] = total.item() / float(count) if count else None
        self._loss.zero_()
        self._metrics.clear()
        self.micro_batches = 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums since the last line."""
        metrics = {name: (total.clone(), count) for name, (total, count) in self._metrics.items()}
        return {"loss": self._loss.clone(), "metrics": metrics, "micro_batches": self.micro_batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`."""
        if "totals" in state:  # of a checkpoint from before tasks, which classified images
            loss, correct = state["totals"]
            state = {**state, "loss": loss, "metrics": {"accuracy": (correct.double(), state["images"])}}
        self._loss.copy_(state["loss"])
        self._metrics = {
            name: (total.to(self._device, copy=True), count) for name, (total, count) in state["metrics"].items()
        }
        self.micro_batches = state["micro_batches"]


def _end_of_records(file: IO[bytes], keep: int) -> int:
    """Returns `keep`, or the end of the last whole record in a file that is shorter than that."""
    if os.fstat(file.fileno()).st_size >= keep:
        return keep
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def records_after(directory: Directory, position: int) -> list[dict[str, Any]]:
    """Returns the records in metrics.jsonl after a `position` of it."""
    found = []
    with directory.open_to_read(METRICS) as file:
        file.seek(position)
        for line in file:
            with suppress(ValueError):  # a line that a node had not brought to disk when it died
                found.append(json.loads(line))
    return found


def line_of(kind: str, step: int, values: Mapping[str, Any]) -> bytes:
    """Returns the line of a record."""
    record = {"kind": kind, "step": step, **{name: strict(value) for name, value in values.items()}}
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def strict(value: Any) -> Any:
    """Returns what JSON can have of a value: None for a number that is NaN or infinite, also in mappings."""
    if isinstance(value, dict):
        return {name: strict(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
