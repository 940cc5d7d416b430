"""The starts of a run, and how often a batch system repeats one."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hvdlocal.directory import Directory

ATTEMPTS = "attempts.jsonl"

MAX_STARTS_WITHOUT_PROGRESS = 3
"""How often a batch system may start a run from the same step before this counts as a permanent failure."""


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


def restart_count() -> int:
    """Returns how often the batch system has restarted this job."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdigit() else 0


def is_of_this_job(directory: Path) -> bool:
    """Returns whether an earlier start of this very job has used the directory."""
    return restart_count() > 0 and was_used_by_this_job(directory)


def was_used_by_this_job(directory: Path) -> bool:
    """Returns whether a start of this job, this one or an earlier one, has used the directory."""
    return any(attempt.get("job") == _job() for attempt in _attempts(directory))


def _attempts(directory: Path) -> list[dict[str, Any]]:
    """Returns the notes of earlier starts, without those that cannot be read."""
    found = []
    with suppress(OSError, UnicodeError):
        for line in (directory / ATTEMPTS).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, RecursionError):
                if isinstance(attempt := json.loads(line), dict):
                    found.append(attempt)
    return found


def _job() -> str:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "-")
