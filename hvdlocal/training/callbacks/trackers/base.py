"""What the trackers share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hvdlocal.training.callbacks.base import EVENT_OF_KIND, Callback, Outcome, Record, RunView


class Tracker(Callback):
    """Writes every finite number of the records under the name "kind/field", on rank 0.

    The tracker's library is imported when training begins, by `on_start`.
    """

    def on_log(self, run: RunView, record: Record) -> None:
        """Writes the numbers of a record."""
        if numbers := numbers_of(record):
            self.write(numbers, record["kind"], record["step"])

    on_round = on_evaluation = on_log

    def on_take_over(self, run: RunView, records: Sequence[Record]) -> None:
        """Writes what the rank that died may not have brought to disk."""
        for record in records:
            if record["kind"] in EVENT_OF_KIND:
                self.on_log(run, record)

    def on_end(self, run: RunView, outcome: Outcome, summary: Record | None) -> None:
        """Closes the files."""
        self.close(outcome)

    def write(self, numbers: dict[str, float], kind: str, step: int) -> None:
        """Writes some numbers.

        Args:
            numbers: by "kind/field".
            kind: of the record.
            step: optimizer steps done.
        """
        raise NotImplementedError

    def close(self, outcome: Outcome) -> None:
        """Closes the files."""
        raise NotImplementedError


def numbers_of(record: Record) -> dict[str, float]:
    """Returns the finite numbers of a record by "kind/field"; a field that is a mapping gives "kind/field/inner"."""
    found: dict[str, float] = {}

    def walk(prefix: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                walk(f"{prefix}/{name}", value)
            elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                found[f"{prefix}/{name}"] = value

    walk(record["kind"], {name: value for name, value in record.items() if name not in ("kind", "step")})
    return found
