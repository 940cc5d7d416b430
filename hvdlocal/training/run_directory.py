"""The directory that a run writes to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

WRITTEN = ("config.yaml", "environment.json", "metrics.jsonl", "model.pt", "last_good.pt", "tensorboard")


def check(directory: Path, overwrite: bool) -> None:
    """Makes the directory and checks that it can be written, without touching what an earlier run left; rank 0 only.

    Raises:
        ValueError: an earlier run is in it and is not to be replaced.
        OSError: it cannot be written.
    """
    left = [name for name in WRITTEN if (directory / name).exists()]
    if left and not overwrite:
        raise ValueError(
            f"{directory} holds an earlier run ({', '.join(left)}): choose another --output, or replace it with --overwrite true"
        )
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / ".writable"
    probe.touch()
    probe.unlink()


def clear(directory: Path) -> None:
    """Removes what an earlier run left, once the new one is sure to start; rank 0 only."""
    for name in WRITTEN:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def describe(directory: Path, config: str, environment: dict[str, Any]) -> None:
    """Writes what the run was told (as YAML, all defaults resolved) and where it runs."""
    (directory / "config.yaml").write_text(config, encoding="utf-8")
    (directory / "environment.json").write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")
