"""What a run prints: a progress bar on a terminal, a line from time to time in a log."""

from __future__ import annotations

import os

from tqdm import tqdm

from hvdlocal import terminal
from hvdlocal.communicator import Communicator, launched_rank


class Console:
    """Prints on rank 0, and nothing on the other ranks. What cannot be printed is lost, and the run continues.

    Args:
        communicator: the ranks.
        total: progress at which the run ends.
        unit: progress of one scale-invariant epoch.
        start: progress at which the run begins or continues.
    """

    def __init__(self, communicator: Communicator, total: float, unit: float, start: float = 0.0) -> None:
        self._speaks = communicator.rank == 0
        self._bar = None
        self._output = terminal.output()
        if self._speaks and _is_watched(self._output):
            layout = "{percentage:3.0f}%|{bar:20}| {n:.1f}/{total:.0f} epochs [{elapsed}<{remaining}{postfix}]"
            # The terminals that mpirun gives its ranks report 0 columns and lines, with which tqdm would draw nothing.
            columns, lines = _size(self._output)
            self._bar = tqdm(
                total=total / unit,
                initial=start / unit,
                bar_format=layout,
                ncols=columns or 110,
                nrows=lines or 24,
                file=self._output,
            )
        self._total, self._unit = total, unit

    def say(self, text: str) -> None:
        """Prints a line."""
        if self._bar is not None:
            self._bar.write(text, file=self._output)
        elif self._speaks:
            print(text, file=self._output, flush=True)

    def progress(self, progress: float, text: str, due: bool) -> None:
        """Shows how far the run is: always on the bar, but in a log only when a line is due."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(min(progress, self._total) / self._unit - self._bar.n)
        elif due:
            self.say(f"epoch {progress / self._unit:7.2f}  {text}")

    def close(self) -> None:
        """Ends the bar, which stays on the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _size(output: terminal.Guarded) -> tuple[int, int]:
    """Returns the columns and lines of a terminal; zeros if it has gone."""
    try:
        return os.get_terminal_size(output.fileno())
    except (OSError, ValueError):
        return 0, 0


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
