"""The directory that a run writes to, and what an earlier attempt left in it."""

from __future__ import annotations

import enum
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import yaml

from hvdlocal.training.config import FREE_TO_CHANGE

CHECKPOINTS = "checkpoints"
SUMMARY = "summary.json"
WRITTEN = (
    "config.yaml",
    "environment.json",
    "attempts.jsonl",
    "metrics.jsonl",
    "model.pt",
    "best.pt",
    "last_good.pt",
    SUMMARY,
    "tensorboard",
    CHECKPOINTS,
)

MAX_STARTS_WITHOUT_PROGRESS = 3
"""So often a batch system may start a run from the same step; then it is no accident."""


LOCK_SECONDS = 5.0
"""How long a start waits for the end of a job before it."""


class Standing(enum.Enum):
    """What is in the directory: nothing of this run, an attempt to continue, or a run that has ended well."""

    NEW = "new"
    STARTED = "started"
    FINISHED = "finished"


def claim(directory: Path) -> IO[bytes]:
    """Makes the directory, checks that it can be written, and keeps other runs out of it as long as the result is open.

    The lock ends with the process, however it ends. On file systems without locks there is none.

    Raises:
        ValueError: another run is using the directory, or it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("ab")
    except OSError as error:
        raise ValueError(
            f"output={directory} cannot be used ({error}): name a directory that can be written"
        ) from error
    try:
        _lock(lock)
    except BlockingIOError:
        lock.close()
        who = (directory / ".lock").read_text(errors="replace")
        raise ValueError(
            f"{directory} is in use by another run ({who}): choose another --output, or end that one"
        ) from None
    except OSError:
        pass  # no locks here
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}, job {os.environ.get('SLURM_JOB_ID', '-')}".encode())
    lock.flush()
    return lock


def _lock(lock: IO[bytes]) -> None:
    """Waits a little: mpirun does not wait for a rank that it has just killed."""
    patience = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > patience:
                raise
        time.sleep(0.1)


def standing(directory: Path, settings: Mapping[str, Any], overwrite: bool) -> Standing:
    """What an earlier attempt left.

    Args:
        settings: of this run, by dotted name.
        overwrite: replace whatever is there, unless a batch system has started the same job again: that one continues.

    Raises:
        ValueError: there is a run with other settings; names the first that differs.
    """
    left = [name for name in WRITTEN if _holds_something(directory / name)]
    if not left or (overwrite and restart_count() == 0):
        return Standing.NEW
    remedy = "choose another --output, or replace it with --overwrite true"
    try:
        earlier = _flat(yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(
            f"{directory} holds an earlier run ({', '.join(left)}) whose config.yaml cannot be read: {remedy}"
        ) from error
    if difference := first_difference(earlier, settings):
        raise ValueError(f"{directory} holds an earlier run {difference}: continue it with its own settings, {remedy}")
    return Standing.FINISHED if (directory / SUMMARY).exists() else Standing.STARTED


def first_difference(earlier: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """The first setting that a continued run may not change and that is another now."""
    for name, now in json.loads(json.dumps(dict(settings))).items():
        if name in FREE_TO_CHANGE or name not in earlier:
            continue
        if (before := earlier[name]) != now:
            return f"with {name}={before}, not {now}"
    return None


def clear(directory: Path) -> None:
    """Removes what an earlier run left, once the new one is sure to start; rank 0 only."""
    for name in WRITTEN:
        path = directory / name
        if not path.is_dir():
            path.unlink(missing_ok=True)
        elif _holds_something(path):  # an empty one may be a disk of its own
            shutil.rmtree(path)


def describe(directory: Path, config: dict[str, Any], environment: dict[str, Any]) -> None:
    """Writes what the run was told, all defaults resolved, and where it runs."""
    write_whole(directory / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    write_whole(directory / "environment.json", json.dumps(environment, indent=1) + "\n")


def note_attempt(directory: Path, step: int, ranks: int) -> None:
    """Notes that the run starts from a step.

    Raises:
        ValueError: a batch system has restarted it from this step several times in a row.
    """
    path = directory / "attempts.jsonl"
    steps = []
    with suppress(OSError, ValueError, KeyError, TypeError):
        steps = [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]
    recent = steps[-MAX_STARTS_WITHOUT_PROGRESS:]
    if restart_count() and recent == [step] * MAX_STARTS_WITHOUT_PROGRESS:
        raise ValueError(
            f"this run has been started {len(recent)} times from step {step} and never came to its next checkpoint: look for the "
            f"cause in its log, then remove {path} and submit it again"
        )
    note = {"step": step, "ranks": ranks, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "restart": restart_count()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(note) + "\n")


def restart_count() -> int:
    """How often the batch system has started this job again."""
    told = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(told) if told.isdigit() else 0


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all, down to the disk."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ValueError("not a configuration")
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
