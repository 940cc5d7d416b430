"""Opening the directory that a run writes to: the same one on all ranks, and for one run at a time."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from hvdlocal.communicator import Communicator, succeed_together
from hvdlocal.directory import Directory
from hvdlocal.exit_codes import ExitCode
from hvdlocal.lock import PATIENCE_SECONDS, hold
from hvdlocal.terminal import plain, warn
from hvdlocal.training.attempts import note_attempt, restart_count
from hvdlocal.training.checkpoint.files import newest_first
from hvdlocal.training.checkpoint.resume import Resumed, resume
from hvdlocal.training.checkpoint.writer import CheckpointWriter
from hvdlocal.training.damage import forget_damage
from hvdlocal.training.run_files import CHECKPOINTS, SUMMARY, TRACKERS, RunStatus, run_id

LOCK = ".lock"

DEAD_LOCK_SECONDS = 120.0
"""How long the lock of a node that died may live: a restart by a batch system waits for it, and a rank that takes over."""


class AlreadyFinished(SystemExit):
    """The output directory holds this run, finished. Raised on all ranks.

    A script that does not catch it ends with exit code 0.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = ExitCode.FINISHED


class _Found(NamedTuple):
    """What rank 0 found in the directory, the file by which the other ranks recognise it, and an identifier for a new run."""

    marker: str
    status: RunStatus
    run_id: str | None
    new_id: str


class OutputDirectory:
    """The output directory of a run, held open on every rank and locked by the first. Opening it is a collective.

    Args:
        path: of the directory.
        communicator: the ranks.
        find_status: returns what an earlier attempt left, and refuses another run with a ValueError; called on rank 0.
        again: what to do in order to run a finished run again.

    Attributes:
        path: of the directory.
        directory: the directory, held open.
        status: what an earlier attempt left; the same on every rank.

    Raises:
        SetupError: the directory cannot be used, or holds another run; on all ranks.
        AlreadyFinished: the run has ended; on all ranks.
    """

    def __init__(
        self, path: Path, communicator: Communicator, find_status: Callable[[], RunStatus], again: str
    ) -> None:
        self.path = path
        self._ranks = communicator.size
        self._is_locked = communicator.rank == 0
        # Not longer than the other ranks wait for this one.
        self._patience = min(DEAD_LOCK_SECONDS, communicator.timeout_seconds / 2)
        with ExitStack() as opened:

            def lock_and_mark() -> _Found | None:
                if communicator.rank != 0:
                    return None
                self.directory: Directory = opened.enter_context(lock(self.path))
                status = find_status()
                marker = f".probe-{secrets.token_hex(8)}"
                opened.callback(self.directory.remove, marker)
                self.directory.write_text(marker, "")
                return _Found(marker, status, run_id(self.directory), secrets.token_hex(8))

            def open_marked() -> None:
                if communicator.rank != 0:
                    self.directory = opened.enter_context(Directory(self.path))
                if not self.directory.exists(found.marker):
                    raise ValueError(
                        f"{self.path} is not the directory that rank 0 sees: it must be on a file system that all "
                        "nodes share"
                    )

            mine = succeed_together(communicator, lock_and_mark, "hvdlocal.output")
            found: _Found = communicator.gather(mine, "hvdlocal.status")[0]
            succeed_together(communicator, open_marked, "hvdlocal.shared_output")
            if communicator.rank == 0:
                self.directory.remove(found.marker)
            if found.status is RunStatus.FINISHED:
                raise AlreadyFinished(f"{self.path} holds this run, finished: nothing to do. {again}.")
            self.status = found.status
            self._run_id = found.run_id if found.status is RunStatus.STARTED else None
            self._new_id = found.new_id
            self._opened = opened.pop_all()

    def resume(
        self, communicator: Communicator, writer: CheckpointWriter, check: Callable[[Mapping[str, Any]], str | None]
    ) -> Resumed | None:
        """Reads the newest usable checkpoint, if there is one; a collective.

        Args:
            communicator: the ranks.
            writer: of the checkpoints; learns how long one took to write.
            check: see `hvdlocal.training.checkpoint.resume.resume`.

        Raises:
            CheckpointError: see there.
        """
        if self.status is not RunStatus.STARTED:
            return None
        resumed = resume(communicator, self.path / CHECKPOINTS, check, self._run_id)
        if resumed is not None:
            writer.write_seconds = resumed.contents["write_seconds"]
        return resumed

    def identify(self, resumed: Resumed | None) -> str:
        """Returns what distinguishes this run from all others, the same on all ranks; a run begun by an old hvdlocal gets its
        identifier now.
        """
        earlier = None if resumed is None else resumed.contents.get("run")
        return self._run_id or earlier or self._new_id

    def what_is_saved(self) -> str:
        """Says what is on disk, and how the run continues."""
        if (self.path / SUMMARY).exists():
            return f"the run in {self.path} is finished"
        if steps := newest_first(self.path / CHECKPOINTS):
            return f"the same command continues from the checkpoint of step {steps[0]} in {self.path / CHECKPOINTS}"
        return f"{self.path} holds no checkpoint to continue from yet, so the same command begins anew"

    def begin_attempt(self, resumed: Resumed | None, writer: CheckpointWriter) -> None:
        """Makes the directory ready for a start of the run; on rank 0.

        Args:
            resumed: the checkpoint from which the run continues; None when it begins.
            writer: discards checkpoints that cannot be used.

        Raises:
            ValueError: a batch system has restarted the run from this step several times in a row.
        """
        forget_damage(self.directory)
        writer.discard_all_but_good(None if resumed is None else resumed.step)
        if resumed is not None:
            for problem in resumed.skipped:
                warn(f"{problem}: going back to step {resumed.step}")
        note_attempt(self.directory, 0 if resumed is None else resumed.step, self._ranks)

    def take_over(self) -> None:
        """Locks the directory on the rank that is the first one now, because those before it have died.

        The lock of a process ends with it, but a file system may keep that of a node that died for a while. On the rank that has
        the lock already, this does nothing.

        Raises:
            OSError: another process holds the lock: a run that was started in the meantime, or a rank that is not dead.
        """
        if self._is_locked:
            return
        try:
            self._opened.callback(hold(self.directory, LOCK, self._patience).close)
        except BlockingIOError as error:
            raise OSError(
                f"{self.path} is locked by another process ({error}), so this rank cannot go on in the place of the one that "
                "held the lock before"
            ) from None
        self._is_locked = True

    def close(self) -> None:
        """Closes the directory and releases its lock."""
        self._opened.close()


class LockedDirectory(Directory):
    """A directory that other runs cannot lock until it is closed.

    The lock ends with the process, however that ends. On file systems without locks there is none.

    Raises:
        BlockingIOError: another run is using the directory; the message says which.
        OSError: it cannot be written, or what a run writes to is a link there, perhaps to files of somebody else.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            patience = DEAD_LOCK_SECONDS if restart_count() else PATIENCE_SECONDS
            self._lock = hold(self, LOCK, patience)
            for name in (CHECKPOINTS, *TRACKERS):
                if self.exists(name):
                    self.inner(name).close()
        except BaseException:
            super().close()
            raise

    def close(self) -> None:
        """Releases the lock and the directory."""
        self._lock.close()
        super().close()


def lock(path: Path) -> LockedDirectory:
    """Makes the directory, checks that it can be written, and locks it.

    Raises:
        ValueError: another run is using the directory, or it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        return LockedDirectory(path)
    except BlockingIOError as error:
        raise ValueError(
            f"{path} is in use by another run ({error}): choose another directory, or end that one"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be used ({plain(error)}): name a directory that can be written") from error
