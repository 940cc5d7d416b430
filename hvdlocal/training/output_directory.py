"""The directory that a run writes to, and what an earlier attempt left in it."""

from __future__ import annotations

import enum
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from hvdlocal.careful import from_yaml, read_text
from hvdlocal.directory import Directory
from hvdlocal.lock import PATIENCE_SECONDS, hold
from hvdlocal.terminal import plain
from hvdlocal.training.config import SETTINGS
from hvdlocal.training.config_checks import flatten

CHECKPOINTS = "checkpoints"
SUMMARY = "summary.json"
ATTEMPTS = "attempts.jsonl"
ENVIRONMENT = "environment.json"
TENSORBOARD = "tensorboard"
WRITTEN = (
    "config.yaml",
    ENVIRONMENT,
    ATTEMPTS,
    "metrics.jsonl",
    "model.pt",
    "best.pt",
    "last_good.pt",
    SUMMARY,
    TENSORBOARD,
    CHECKPOINTS,
)

MOST_BYTES = 1 << 20
"""Of config.yaml, which holds every setting once."""

MAX_STARTS_WITHOUT_PROGRESS = 3
"""So often a batch system may start a run from the same step; then it is no accident."""


REQUEUED_LOCK_SECONDS = 120.0
"""How long a start that a batch system makes waits for the lock of the one before: that of a node that died may live so long."""


class RunStatus(enum.Enum):
    """What is in the directory: nothing of this run, an attempt to continue, or a run that has ended well."""

    NEW = "new"
    STARTED = "started"
    FINISHED = "finished"


class Claimed(Directory):
    """The directory of a run, which other runs are kept out of until it is closed.

    The lock ends with the process, however it ends. On file systems without locks there is none.

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
        """Lets other runs in."""
        self._lock.close()
        super().close()


def claim(path: Path) -> Claimed:
    """Makes the directory, checks that it can be written, and keeps other runs out of it as long as the result is open.

    Raises:
        ValueError: another run is using the directory, or it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        return Claimed(path)
    except BlockingIOError as error:
        raise ValueError(
            f"{path} is in use by another run ({error}): choose another --output, or end that one"
        ) from None
    except OSError as error:
        raise ValueError(
            f"output={path} cannot be used ({plain(error)}): name a directory that can be written"
        ) from error


def find_status(directory: Path, settings: Mapping[str, Any], overwrite: bool) -> RunStatus:
    """What an earlier attempt left.

    Args:
        settings: of this run, by dotted name; those that have an effect in it.
        overwrite: replace whatever is there, unless this very job has written it, and is now started again: it continues.

    Raises:
        ValueError: there is a run with other settings; names the first that differs.
    """
    left = [name for name in WRITTEN if _holds_something(directory / name)]
    if not left or (overwrite and not _is_of_this_job(directory)):
        return RunStatus.NEW
    remedy = "choose another --output, or replace it with --overwrite true"
    try:
        earlier = flatten(from_yaml(read_text(directory / "config.yaml", MOST_BYTES)))
    except ValueError as error:
        raise ValueError(
            f"{directory} holds an earlier run ({', '.join(left)}) whose config.yaml cannot be read: {remedy}"
        ) from error
    if difference := first_difference(earlier, settings):
        raise ValueError(f"{directory} holds an earlier run {difference}: continue it with its own settings, {remedy}")
    return RunStatus.FINISHED if (directory / SUMMARY).exists() else RunStatus.STARTED


def first_difference(earlier: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """The first setting that a continued run may not change and that is another now."""
    for name, now in json.loads(json.dumps(dict(settings))).items():
        if SETTINGS[name].resumable or name not in earlier:
            continue
        if (before := earlier[name]) != now:
            return f"with {name}={_as_written(before)}, not {_as_written(now)}"
    return None


def _as_written(value: Any) -> str:
    """As a configuration has it: null and true, not None and True."""
    return value if isinstance(value, str) else json.dumps(value)


def clear(directory: Directory) -> None:
    """Removes what an earlier run left, once the new one is sure to start; rank 0 only.

    At no moment does what is left look like a run to continue: what makes it one goes first, and its config.yaml is left for
    `describe` to replace.
    """
    for name in (SUMMARY, CHECKPOINTS, *(name for name in WRITTEN if name != "config.yaml")):
        if directory.is_directory(name):
            with directory.inner(name) as inner:  # which may be a disk of its own, and stays
                inner.clear()
        else:
            directory.remove(name)


def describe(directory: Directory, config: dict[str, Any], environment: dict[str, Any]) -> None:
    """Writes what the run was told, all defaults resolved, and where it runs."""
    directory.write_text("config.yaml", yaml.safe_dump(config, sort_keys=False))
    directory.write_text(ENVIRONMENT, json.dumps(environment, indent=1) + "\n")


def run_id(directory: Directory) -> str | None:
    """What tells the run in the directory from every other; None for one that was begun before there was such a thing."""
    try:
        told = json.loads(directory.read_text(ENVIRONMENT)).get("run")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
    return told if isinstance(told, str) else None


def note_attempt(directory: Directory, step: int, ranks: int) -> None:
    """Notes that the run starts from a step.

    Raises:
        ValueError: a batch system has restarted it from this step several times in a row.
    """
    earlier = _attempts(directory.path)
    steps = [attempt.get("step") for attempt in earlier]
    recent = steps[-MAX_STARTS_WITHOUT_PROGRESS:]
    if restart_count() and recent == [step] * MAX_STARTS_WITHOUT_PROGRESS:
        raise ValueError(
            f"this run has been started {len(recent)} times from step {step} and never came to its next checkpoint: look for the "
            f"cause in its log, then remove {directory.path / ATTEMPTS} and submit it again"
        )
    note = {"step": step, "ranks": ranks, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "job": _job()}
    directory.write_text(ATTEMPTS, "".join(json.dumps(attempt) + "\n" for attempt in [*earlier, note]))


def _attempts(directory: Path) -> list[dict[str, Any]]:
    """What is noted of earlier starts; what cannot be read is left out."""
    found = []
    with suppress(OSError, UnicodeError):
        for line in (directory / ATTEMPTS).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, RecursionError):
                if isinstance(attempt := json.loads(line), dict):
                    found.append(attempt)
    return found


def _is_of_this_job(directory: Path) -> bool:
    return restart_count() > 0 and any(attempt.get("job") == _job() for attempt in _attempts(directory))


def _job() -> str:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "-")


def restart_count() -> int:
    """How often the batch system has started this job again."""
    told = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(told) if told.isdigit() else 0


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()
