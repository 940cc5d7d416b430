"""When to leave: signals of the batch system, and the end of the time it gives."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM)
"""USR2 is what the templates send; NCCL may use USR1 for itself. Slurm sends TERM before it kills."""

SLURM_GRACE_SECONDS = 30.0
"""Of Slurm's end of a job nothing is used: the end comes up to a minute early, and the clocks of nodes differ."""

_received: signal.Signals | None = None


def install_handlers() -> None:
    """Makes the signals set a flag. To be called first of all: until then they end the process."""
    for number in SIGNALS:
        signal.signal(number, _note)


def received() -> signal.Signals | None:
    """The first signal that asked this process to stop."""
    return _received


class Deadline:
    """The moment by which this process must have left, on a clock that only runs forwards.

    Args:
        minutes: after the start of this process; None when only the batch system sets an end.
    """

    def __init__(self, minutes: float | None) -> None:
        now = time.monotonic()
        ends = [] if minutes is None else [now + 60 * minutes - _seconds_since_start()]
        told = os.environ.get("SLURM_JOB_END_TIME", "")
        if told.isdigit():  # looked at once: the clock on the wall may jump
            ends.append(now + int(told) - time.time() - SLURM_GRACE_SECONDS)
        self._end = min(ends, default=None)

    def passes_within(self, seconds: float) -> bool:
        """Whether less than so many seconds are left."""
        return self._end is not None and time.monotonic() + seconds > self._end


def _seconds_since_start() -> float:
    """Seconds since this process was started; importing libraries from a busy file system may have taken minutes."""
    with open("/proc/self/stat", encoding="ascii") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _note(number: int, _: FrameType | None) -> None:
    global _received
    if _received is None:
        _received = signal.Signals(number)
