"""Opening the directory that a run writes to: the same one on all ranks, and for one run at a time."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from hvdlocal.communicator import Communicator, succeed_together
from hvdlocal.directory import Directory
from hvdlocal.lock import PATIENCE_SECONDS, hold
from hvdlocal.terminal import plain, warn
from hvdlocal.training.attempts import note_attempt, restart_count
from hvdlocal.training.checkpoint.resume import Resumed
from hvdlocal.training.checkpoint.writer import CheckpointWriter
from hvdlocal.training.config import TrainConfig
from hvdlocal.training.config_checks import effective_settings
from hvdlocal.training.damage import forget_damage
from hvdlocal.training.metrics import METRICS
from hvdlocal.training.run_files import CHECKPOINTS, TENSORBOARD, RunStatus, clear, describe, find_status, run_id

REQUEUED_LOCK_SECONDS = 120.0
"""How long a restart by a batch system waits for the lock of the start before: that of a node that died may live that long."""


class AlreadyFinished(Exception):  # noqa: N818  (no error)
    """The output directory holds this run, finished. Raised on all ranks."""


class _Found(NamedTuple):
    """What rank 0 found in the directory, and the file by which the other ranks recognise it."""

    marker: str
    status: RunStatus
    run_id: str | None


class OutputDirectory:
    """The output directory of a run, held open on every rank and locked by rank 0. Opening it is a collective.

    Args:
        config: its settings decide whether what is there can be continued.
        communicator: the ranks.

    Attributes:
        path: of the directory, as configured.
        directory: the directory, held open.
        status: what an earlier attempt left; the same on every rank.
        run_id: identifies the run that is to be continued; None for a new one, and for one begun by an old hvdlocal.

    Raises:
        SetupError: the directory cannot be used, or holds another run; on all ranks.
        AlreadyFinished: the run has ended; on all ranks.
    """

    def __init__(self, config: TrainConfig, communicator: Communicator) -> None:
        self.path = Path(config.output)
        self._ranks = communicator.size
        with ExitStack() as opened:

            def lock_and_mark() -> _Found | None:
                if communicator.rank != 0:
                    return None
                self.directory: Directory = opened.enter_context(lock(self.path))
                status = find_status(self.path, effective_settings(config), config.overwrite)
                marker = f".probe-{secrets.token_hex(8)}"
                opened.callback(self.directory.remove, marker)
                self.directory.write_text(marker, "")
                return _Found(marker, status, run_id(self.directory))

            def open_marked() -> None:
                if communicator.rank != 0:
                    self.directory = opened.enter_context(Directory(self.path))
                if not self.directory.exists(found.marker):
                    raise ValueError(
                        f"output={self.path} is not the directory that rank 0 sees: it must be on a file system that all "
                        "nodes share"
                    )

            mine = succeed_together(communicator, lock_and_mark, "hvdlocal.output")
            found: _Found = communicator.gather(mine, "hvdlocal.status")[0]
            succeed_together(communicator, open_marked, "hvdlocal.shared_output")
            if communicator.rank == 0:
                self.directory.remove(found.marker)
            if found.status is RunStatus.FINISHED:
                raise AlreadyFinished(
                    f"{self.path} holds this run, finished: nothing to do. --overwrite true runs it again."
                )
            self.status = found.status
            self.run_id = found.run_id if found.status is RunStatus.STARTED else None
            self._opened = opened.pop_all()

    def begin_attempt(
        self, config: TrainConfig, environment: Mapping[str, Any], resumed: Resumed | None, writer: CheckpointWriter
    ) -> int:
        """Makes the directory ready for a start of the run; on rank 0.

        Args:
            config: goes into config.yaml.
            environment: goes into environment.json.
            resumed: the checkpoint from which the run continues; None when it begins.
            writer: discards checkpoints that cannot be used.

        Returns:
            Bytes of metrics.jsonl to keep.

        Raises:
            ValueError: a batch system has restarted the run from this step several times in a row.
        """
        forget_damage(self.directory)
        kept = 0
        if resumed is None and self.status is RunStatus.NEW:
            clear(self.directory)
        else:
            writer.discard_all_but_good(None if resumed is None else resumed.step)
        if resumed is not None:
            kept = self._kept_bytes(resumed)
        describe(self.directory, asdict(config), environment)
        note_attempt(self.directory, 0 if resumed is None else resumed.step, self._ranks)
        return kept

    def _kept_bytes(self, resumed: Resumed) -> int:
        """Returns how much of metrics.jsonl was written by the checkpoint, with warnings about what is lost."""
        for problem in resumed.skipped:
            warn(f"{problem}: going back to step {resumed.step}")
        kept = resumed.contents["metrics_bytes"]
        path = self.path / METRICS
        size = path.stat().st_size if path.exists() else 0
        if size < kept:
            warn(f"{path} has lost {kept - size} bytes that were in it at the checkpoint of step {resumed.step}")
        return kept

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
            patience = REQUEUED_LOCK_SECONDS if restart_count() else PATIENCE_SECONDS
            self._lock = hold(self, ".lock", patience)
            for name in (CHECKPOINTS, TENSORBOARD):
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
            f"{path} is in use by another run ({error}): choose another --output, or end that one"
        ) from None
    except OSError as error:
        raise ValueError(
            f"output={path} cannot be used ({plain(error)}): name a directory that can be written"
        ) from error
