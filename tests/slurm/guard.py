"""The processes of a cluster, known by SLURM_CONF in their environment. None outlives the tests, even when these are killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def processes_with(**variables: str) -> dict[int, str]:
    """Command lines, by process id, of all processes that have these variables in their environment."""
    wanted = {f"{name}={value}".encode() for name, value in variables.items()}
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # ended just now, or somebody else's
            continue
        if wanted <= set(environment):
            found[int(entry.name)] = command.strip()
    return found


@contextmanager
def guarded(configuration: Path) -> Iterator[None]:
    """Starts a process that outlives us and ends what is left of the cluster when we have gone, however that happened."""
    command = [sys.executable, __file__, str(configuration)]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        guard.communicate()


def end_what_is_left(configuration: Path) -> None:
    """Kills until nothing is left (a killed process may have started another), and removes the cluster's directory."""
    deadline = time.monotonic() + 10
    while (left := processes_with(SLURM_CONF=str(configuration))) and time.monotonic() < deadline:
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)
    shutil.rmtree(configuration.parent, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.read()  # ends when we have gone
    end_what_is_left(Path(sys.argv[1]))
