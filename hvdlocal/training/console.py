"""What a person sees of a run: a progress bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import os

from tqdm import tqdm

from hvdlocal import terminal
from hvdlocal.communicator import Communicator, launched_rank


class Console:
    """Rank 0's voice; silent on the other ranks. What cannot be written is lost, and the run goes on.

    Args:
        communicator: of the run.
        total: progress at which the run ends.
        unit: progress of one scale-invariant epoch.
        start: progress of a run that goes on.
    """

    def __init__(self, communicator: Communicator, total: float, unit: float, start: float = 0.0) -> None:
        self._speaks = communicator.rank == 0
        self._bar = None
        self._output = terminal.output()
        if self._speaks and _is_watched(self._output):
            layout = "{percentage:3.0f}%|{bar:20}| {n:.1f}/{total:.0f} epochs [{elapsed}<{remaining}{postfix}]"
            # The terminals that mpirun gives its ranks say that they have 0 columns and lines, and tqdm would draw nothing.
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
        """Shows how far the run is: on the bar always, in a log only when a line is due."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(min(progress, self._total) / self._unit - self._bar.n)
        elif due:
            self.say(f"epoch {progress / self._unit:7.2f}  {text}")

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _size(output: terminal.Guarded) -> tuple[int, int]:
    """Columns and lines of a terminal; 0 when it is gone."""
    try:
        return os.get_terminal_size(output.fileno())
    except (OSError, ValueError):
        return 0, 0


def _is_watched(output: terminal.Guarded) -> bool:
    """Whether a person looks on. Under mpirun every rank has a terminal of its own, so its launcher is asked."""
    if not output.isatty():
        return False
    if launched_rank() is None:
        return True
    try:
        return os.readlink(f"/proc/{os.getppid()}/fd/1").startswith("/dev/pts/")
    except OSError:
        return False
