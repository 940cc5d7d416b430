"""When to stop: signals from the user and the batch system, and the end of the allotted time."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from hvdlocal import terminal
from hvdlocal.communicator.launched import launched_rank
from hvdlocal.exit_codes import ExitCode

if TYPE_CHECKING:  # which loads torch
    from hvdlocal.communicator import Communicator

SIGNALS = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""USR2 is what the templates send; NCCL may use USR1 for itself. Slurm sends TERM before it kills. INT is Ctrl-C."""

SLURM_GRACE_SECONDS = 30.0
"""Safety margin before Slurm's end of the job: Slurm may act up to a minute early, and the clocks of nodes differ."""

_received: signal.Signals | None = None


def _nothing_saved() -> str:
    return "training had not begun, and nothing has changed"


_saved: Callable[[], str] = _nothing_saved


class Interrupted(SystemExit):
    """The run was asked to stop, and its checkpoint is on disk: the same command continues it. Raised on all ranks.

    A script that does not catch it ends with exit code 85, by which the batch templates start the job again.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = ExitCode.INTERRUPTED


_replaced: dict[signal.Signals, Any] = {}
"""The handlers that the signals had before."""


def install_handlers() -> None:
    """Makes the signals set a flag, unless they do so already. Call it first of all: until then they end the process."""
    if _replaced:
        return
    for number in SIGNALS:
        # A shell starts `hvdlocal train … &` with INT ignored, because Ctrl-C is not meant for it.
        if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            _replaced[number] = signal.signal(number, _note)
    # A thread of its own reports signals: the main thread may be in a step or a collective for seconds, and mpirun leaves its
    # ranks a quarter of a second.
    arrivals, arrival = os.pipe()
    os.set_blocking(arrival, False)
    signal.set_wakeup_fd(arrival, warn_on_full_buffer=False)
    threading.Thread(target=_announce, args=(arrivals,), name="hvdlocal-signals", daemon=True).start()


def restore_handlers() -> None:
    """Gives the signals back the handlers that they had before: a program goes on after its run."""
    if not _replaced:
        return
    os.close(signal.set_wakeup_fd(-1))  # ends the thread
    for number, handler in _replaced.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    _replaced.clear()


def received() -> signal.Signals | None:
    """Returns the first signal that asked this process to stop; None if there was none."""
    return _received


def remember(saved: Callable[[], str]) -> None:
    """Sets the function that says what the run has saved and how it continues; it is called when a signal arrives."""
    global _saved
    _saved = saved


def ignore() -> None:
    """Ignores signals from now on: the end of the run is decided, and a late signal must not turn it into a failure."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # stays so while Python itself ends; a handler of ours would not


def announce_end(communicator: Communicator, text: str) -> None:
    """Prints on the first rank how the run has ended, and waits for the others; a late signal changes nothing any more."""
    if not hasattr(sys, "ps1"):  # an interactive session goes on
        ignore()
    from hvdlocal.communicator.agreement import by_first_rank  # loads torch

    by_first_rank(communicator, lambda: terminal.say(text), "hvdlocal.end")


class Deadline:
    """The moment at which this process must have ended, on a clock that only runs forwards.

    Args:
        minutes: after the start of this process; None if only the batch system sets an end.
    """

    def __init__(self, minutes: float | None) -> None:
        now = time.monotonic()
        ends = [] if minutes is None else [now + 60 * minutes - _seconds_since_start()]
        told = os.environ.get("SLURM_JOB_END_TIME", "")
        if told.isdigit():  # read once, as the wall clock may jump
            ends.append(now + int(told) - time.time() - SLURM_GRACE_SECONDS)
        self._end = min(ends, default=None)

    def passes_within(self, seconds: float) -> bool:
        """Returns whether fewer than `seconds` seconds are left."""
        return self._end is not None and time.monotonic() + seconds > self._end


def _seconds_since_start() -> float:
    """Returns the seconds since this process started; importing libraries from a busy file system may have taken minutes."""
    with open("/proc/self/stat", encoding="ascii") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _note(number: int, _: FrameType | None) -> None:
    global _received
    if _received is None:
        _received = signal.Signals(number)


def _announce(arrivals: int) -> None:
    """Reports on rank 0 what each signal will do; ends the process at the second Ctrl-C."""
    signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGTTOU}
    )  # or `stty tostop` would stop a rank that writes to the terminal
    speaks = launched_rank() in (None, 0)
    interrupts = 0
    while numbers := os.read(arrivals, 64):
        for number in numbers:
            interrupts += number == signal.SIGINT
            if speaks and (text := _announcement(number, interrupts)) is not None:
                _tell(text)
            if interrupts > 1:
                os._exit(ExitCode.STOPPED)  # as safe as a kill, whatever the main thread waits for
    os.close(arrivals)


def _announcement(number: int, interrupts: int) -> str | None:
    if number == signal.SIGINT and interrupts == 1:
        return "Ctrl-C: the run writes a checkpoint and stops. Ctrl-C again stops it at once."
    if number == signal.SIGINT:
        return f"stopped: {_saved()}."
    if number == signal.SIGTERM and launched_rank() is not None:
        return f"SIGTERM: {_saved()}. (After Ctrl-C or TERM mpirun leaves no time for a checkpoint; after `kill -USR2` it does.)"
    return None  # signals from Slurm and others are reported when the checkpoint is written


def _tell(text: str) -> None:
    """Writes a line to the user."""
    if launched_rank() is not None:
        with suppress(OSError):  # there is no terminal
            # After Ctrl-C, Open MPI 5 no longer forwards what its ranks print.
            descriptor = os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY)
            try:
                os.write(descriptor, f"\nhvdlocal: {text}\n".encode())
            finally:
                os.close(descriptor)
            return
    terminal.complain(f"hvdlocal: {text}")
