"""The files of a run, and what an earlier attempt left of them."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hvdlocal.directory import Directory
from hvdlocal.training.attempts import ATTEMPTS, is_of_this_job
from hvdlocal.training.config import SETTINGS, flatten
from hvdlocal.untrusted_files import from_yaml, read_text

CHECKPOINTS = "checkpoints"
SUMMARY = "summary.json"
ENVIRONMENT = "environment.json"
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""The directories of the trackers, by the name of the callback that writes there."""
WRITTEN = (
    "config.yaml",
    ENVIRONMENT,
    ATTEMPTS,
    "metrics.jsonl",
    "model.pt",
    "best.pt",
    "last_good.pt",
    SUMMARY,
    *TRACKERS,
    CHECKPOINTS,
)

MOST_BYTES = 1 << 20
"""The largest config.yaml that is read; a real one holds every setting once."""


class RunStatus(enum.Enum):
    """What is in the directory: nothing of this run, an attempt to continue, or a run that has ended well."""

    NEW = "new"
    STARTED = "started"
    FINISHED = "finished"


def find_status(directory: Path, settings: Mapping[str, Any], overwrite: bool) -> RunStatus:
    """Returns what an earlier attempt left.

    Args:
        directory: where the run writes.
        settings: of this run, by dotted name; only those that have an effect in it.
        overwrite: whether to replace what is there. What this very job wrote before its restart is continued nevertheless.

    Raises:
        ValueError: there is a run with other settings; the message names the first that differs.
    """
    left = [name for name in WRITTEN if _holds_something(directory / name)]
    if not left or (overwrite and not is_of_this_job(directory)):
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
    """Describes the first setting that has changed and may not change when a run is continued; None if there is none."""
    for name, now in json.loads(json.dumps(dict(settings))).items():
        if SETTINGS[name].resumable or name not in earlier:
            continue
        if (before := earlier[name]) != now:
            return f"with {name}={_as_written(before)}, not {_as_written(now)}"
    return None


def _as_written(value: Any) -> str:
    """Returns a value as a configuration file has it: null and true, not None and True."""
    return value if isinstance(value, str) else json.dumps(value)


def clear(directory: Directory) -> None:
    """Removes what an earlier run left, once the new one is certain to start; rank 0 only.

    At no moment do the remaining files look like a run to continue: what makes them one is removed first, and `describe`
    replaces the config.yaml.
    """
    for name in (SUMMARY, CHECKPOINTS, *(name for name in WRITTEN if name != "config.yaml")):
        if directory.is_directory(name):
            with directory.inner(name) as inner:  # which may be a disk of its own, and stays
                inner.clear()
        else:
            directory.remove(name)


def describe(directory: Directory, config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
    """Writes the configuration, with all defaults resolved, and where the run takes place."""
    directory.write_text("config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    directory.write_text(ENVIRONMENT, json.dumps(dict(environment), indent=1) + "\n")


def run_id(directory: Directory) -> str | None:
    """Returns the identifier of the run in the directory; None for one that was begun before runs had identifiers."""
    found = read_environment(directory).get("run")
    return found if isinstance(found, str) else None


def read_environment(directory: Directory) -> dict[str, Any]:
    """Returns what environment.json holds; nothing if it cannot be read."""
    try:
        found = json.loads(directory.read_text(ENVIRONMENT))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()
