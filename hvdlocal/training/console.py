"""What a run prints: a progress bar on a terminal, a line from time to time in a log."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress

from tqdm import tqdm

from hvdlocal import terminal
from hvdlocal.communicator import Communicator, launched_rank
from hvdlocal.training.status_line import Status

BAR = "{percentage:3.0f}%|{bar:10}| "
BAR_COLUMNS = 18
"""Columns that `BAR` takes."""

DRAW_SECONDS = 0.2
"""How often the bar is drawn again."""


class Console:
    """Prints on rank 0, and nothing on the other ranks. What cannot be printed is lost, and the run continues.

    Args:
        communicator: the ranks.
        epochs: the budget in scale-invariant epochs.
        start: where the run begins or continues.
    """

    def __init__(self, communicator: Communicator, epochs: float, start: float = 0.0) -> None:
        self._communicator = communicator
        self._bar: tqdm | None = None
        self._output = terminal.output()
        self._drawn = 0.0
        self._epochs = epochs
        self.open(start)

    @property
    def _speaks(self) -> bool:
        return self._communicator.rank == 0

    def open(self, start: float) -> None:
        """Shows the bar, if this rank prints and there is a terminal; also where it has become rank 0.

        Args:
            start: epochs done.
        """
        if self._speaks and self._bar is None and _is_watched(self._output):
            columns, lines = _size(self._output)
            self._bar = tqdm(
                total=self._epochs,
                initial=start,
                bar_format=BAR + "{desc}",
                ncols=columns,
                nrows=lines,
                file=self._output,
            )

    def say(self, text: str) -> None:
        """Prints a line."""
        if self._bar is not None:
            self._bar.write(text, file=self._output)
        elif self._speaks:
            print(text, file=self._output, flush=True)

    def progress(self, status: Callable[[], Status], due: bool) -> None:
        """Shows how far the run is: several times a second on the bar, but in a log only when a line is due."""
        if self._bar is None:
            if due and self._speaks:
                self.say(status().log_line())
        elif due or time.monotonic() - self._drawn >= DRAW_SECONDS:
            self._drawn = time.monotonic()
            self._draw(self._bar, status())

    def _draw(self, bar: tqdm, status: Status) -> None:
        bar.ncols, _ = _size(self._output)  # a window may change its size
        bar.set_description_str(status.fitted(bar.ncols - BAR_COLUMNS), refresh=False)
        bar.n = min(status.epoch, self._epochs)
        bar.refresh()

    def close(self) -> None:
        """Ends the bar, which stays on the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _size(output: terminal.Guarded) -> tuple[int, int]:
    """Returns the columns and lines of a terminal. The terminals that mpirun gives its ranks have none; its own has."""
    with suppress(OSError, ValueError):
        columns, lines = os.get_terminal_size(output.fileno())
        if columns and lines:
            return columns, lines
    with suppress(OSError), open(f"/proc/{os.getppid()}/fd/1", "rb") as launcher:
        columns, lines = os.get_terminal_size(launcher.fileno())
        if columns and lines:
            return columns, lines
    return 80, 24


def _is_watched(output: terminal.Guarded) -> bool:
    """Returns whether stdout is interactive. Under mpirun every rank has a terminal of its own, so the launcher's is checked."""
    if not output.isatty():
        return False
    if launched_rank() is None:
        return True
    try:
        return os.readlink(f"/proc/{os.getppid()}/fd/1").startswith("/dev/pts/")
    except OSError:
        return False
