"""Starting the ranks of one run after the other, so that a signal ends the running one in order."""

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
    """The whole command of a run."""
    return [*launcher, str(ranks), sys.executable, "-m", "hvdlocal", "train", *arguments]


class Supervisor:
    """Runs commands; within it, a signal asks the running one to stop in order, and a second one ends it at once.

    Attributes:
        asked: how many signals have come.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Supervisor:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup is to go on
                self._handlers[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], log: Path) -> int:
        """Runs a command and appends what it says to a file.

        Ranks have one thread each, unless OMP_NUM_THREADS says otherwise: so results do not depend on the number of cores.

        Returns:
            Its exit code.
        """
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                without_leftovers(command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # else a terminal's Ctrl-C would reach mpirun, which kills
            )
            if self.asked:  # between the two
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
