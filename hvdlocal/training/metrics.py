"""The record of a run: one JSON object a line, written by rank 0."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol


class Metrics(Protocol):
    """Where records go."""

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Adds one record of a kind ("steps", "round", "evaluation" …) at an optimizer step."""

    def flush(self) -> None:
        """Puts on disk what was written."""

    def close(self) -> None:
        """Ends the record."""


class NoMetrics:
    """For all ranks but the first."""

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class JsonLines:
    """`metrics.jsonl`, the source of truth: strict JSON (NaN and infinity become null), in the order of writing."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """See `Metrics`."""
        record = {"kind": kind, "step": step, **{name: _strict(value) for name, value in values.items()}}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def flush(self) -> None:
        """See `Metrics`."""
        self._file.flush()

    def close(self) -> None:
        """See `Metrics`."""
        self._file.close()


class TensorBoard:
    """The same numbers as TensorBoard scalars, beside another record."""

    def __init__(self, directory: Path, other: Metrics) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("tensorboard=true needs TensorBoard: pip install hvdlocal[tensorboard]") from error
        self._writer = SummaryWriter(str(directory))
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

    def close(self) -> None:
        """See `Metrics`."""
        self._other.close()
        self._writer.close()


def _strict(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
