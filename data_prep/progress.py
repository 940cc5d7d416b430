"""How far the writing is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

_SECONDS = 10.0


class ProgressBar:
    """Counts samples of one split.

    Args:
        name: of the split.
        total: its number of samples.
        shown: whether anything is shown at all; rank 0 alone shows it.
    """

    def __init__(self, name: str, total: int, shown: bool) -> None:
        self._name, self._total, self._shown = name, total, shown
        self._done = 0
        self._started = self._said = time.monotonic()
        self._bar = tqdm(total=total, desc=name, unit=" samples") if shown and sys.stderr.isatty() else None

    def __call__(self, samples: int) -> None:
        """Counts more samples as done."""
        self._done += samples
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(samples)
        elif self._shown and now - self._said > _SECONDS:
            self._said = now
            rate = self._done / (now - self._started)
            print(
                f"{self._name}: {self._done} of {self._total} samples, {rate:.0f} per second",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
