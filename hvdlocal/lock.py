"""A lock that ends with the process which holds it, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from typing import IO

from hvdlocal.directory import Directory

PATIENCE_SECONDS = 5.0
"""How long a start waits for the end of a job before it: mpirun does not wait for a rank that it has just killed."""


def hold(directory: Directory, name: str, patience_seconds: float = PATIENCE_SECONDS) -> IO[bytes]:
    """Locks a file, which is created if need be; closing the result lets go of it. On file systems without locks there is none.

    Args:
        directory: where the file is.
        name: of the file; it will say who holds it.
        patience_seconds: how long to wait for another process.

    Raises:
        BlockingIOError: another process holds it; the message says which.
        OSError: the file cannot be opened, or is a link.
    """
    end = time.monotonic() + patience_seconds
    while True:
        lock = directory.open_to_append(name)
        try:
            _wait(lock, end)
            if _is_there(lock, directory, name) or time.monotonic() > end:
                break
            lock.close()
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read(1000).decode(errors="replace")
            lock.close()
            raise BlockingIOError(holder) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}, job {os.environ.get('SLURM_JOB_ID', '-')}".encode())
    return lock


def _is_there(lock: IO[bytes], directory: Directory, name: str) -> bool:
    """Whether the file that is locked still has its name: the process that held it before may have removed it."""
    return directory.exists(name) and os.path.samestat(directory.stat(name), os.fstat(lock.fileno()))


def _wait(lock: IO[bytes], end: float) -> None:
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        except OSError:
            return None  # no locks here
        time.sleep(0.1)
