"""A lock that ends with the process which holds it, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

PATIENCE_SECONDS = 5.0
"""How long a start waits for the end of a job before it: mpirun does not wait for a rank that it has just killed."""


def hold(path: Path, patience_seconds: float = PATIENCE_SECONDS) -> IO[bytes]:
    """Locks a file, which is created if need be; closing the result lets go of it. On file systems without locks there is none.

    Args:
        path: the file; it will say who holds it.
        patience_seconds: how long to wait for another process.

    Raises:
        BlockingIOError: another process holds it; the message says which.
        OSError: the file cannot be opened.
    """
    lock = path.open("ab")
    try:
        _wait(lock, patience_seconds)
    except BlockingIOError:
        lock.close()
        raise BlockingIOError(path.read_text(errors="replace")) from None
    except OSError:
        pass  # no locks here
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}, job {os.environ.get('SLURM_JOB_ID', '-')}".encode())
    lock.flush()
    return lock


def _wait(lock: IO[bytes], patience_seconds: float) -> None:
    end = time.monotonic() + patience_seconds
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)
