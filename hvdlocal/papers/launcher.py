"""Starts the ranks of one run after the other; a signal ends the current run in an orderly way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from hvdlocal.launch_command import without_leftovers
from hvdlocal.training import interruption

SIGNALS = (*interruption.SIGNALS, signal.SIGHUP)


def train_command(launcher: Sequence[str], ranks: int, arguments: Sequence[str]) -> list[str]:
    """Returns the complete command of a run."""
    return [*launcher, str(ranks), sys.executable, "-m", "hvdlocal", "train", *arguments]


class Supervisor:
    """Runs commands. Within the context, a signal asks the current command to stop in order; a second one ends it at once.

    Attributes:
        asked: number of signals received.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Supervisor:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # a command under nohup continues
                self._handlers[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], log: Path) -> int:
        """Runs a command and appends its output to a file.

        Each rank has one thread unless OMP_NUM_THREADS is set, so that results do not depend on the number of cores.

        Args:
            command: the command.
            log: the file for its output.

        Returns:
            The command's exit code.
        """
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                without_leftovers(command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # otherwise a terminal's Ctrl-C would reach mpirun, which kills the ranks
            )
            if self.asked:  # a signal came before the process was known
                self._pass_on()
            code = self._process.wait()
            self._process = None
        return code

    def _ask(self, _: int, __: FrameType | None) -> None:
        self.asked += 1
        self._pass_on()

    def _pass_on(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGUSR2 if self.asked == 1 else signal.SIGTERM)
