"""A file lock that ends with the process that holds it, however that process ends."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from typing import IO

from hvdlocal.directory import Directory

PATIENCE_SECONDS = 5.0
"""How long a start waits for an earlier job to end: mpirun does not wait for ranks that it has just killed."""


def hold(directory: Directory, name: str, patience_seconds: float = PATIENCE_SECONDS) -> IO[bytes]:
    """Locks a file, which is created if necessary; closing the returned file releases the lock.

    On file systems that do not support locks, the file is opened without one.

    Args:
        directory: the directory of the file.
        name: name of the file; its content names the process that holds the lock.
        patience_seconds: how long to wait for another process.

    Raises:
        BlockingIOError: another process holds the lock; the message names that process.
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
    """Returns whether the locked file still has its name: the process that held it before may have removed it."""
    return directory.exists(name) and os.path.samestat(directory.stat(name), os.fstat(lock.fileno()))


def _wait(lock: IO[bytes], end: float) -> None:
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        except OSError:
            return None  # this file system has no locks
        time.sleep(0.1)
