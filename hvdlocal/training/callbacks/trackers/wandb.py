"""Weights & Biases, offline."""

from __future__ import annotations

import os
from typing import Any

from hvdlocal.training.callbacks.base import Outcome, RunView
from hvdlocal.training.callbacks.trackers.base import Tracker


class Wandb(Tracker):
    """Writes to `wandb/` in the output directory; `wandb sync runs/*/wandb/offline-run-*` uploads it, from a login node.

    Each part of an interrupted run has a directory of its own there, all with the same run id: they become one run.

    Args:
        project: the project's name.
        init: further arguments of `wandb.init`, such as `entity`, `tags` or `mode`. Without `mode`, the environment variable
            WANDB_MODE decides, and without that nothing is sent.
    """

    def __init__(self, project: str = "hvdlocal", **init: Any) -> None:
        self._init = {"project": project, "mode": os.environ.get("WANDB_MODE", "offline"), **init}

    def on_start(self, run: RunView) -> None:
        """Begins or continues the run."""
        if self._init["mode"] != "online":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read at import
        import wandb

        settings = wandb.Settings(console="off", quiet=True, disable_git=True, x_disable_stats=True)
        given = {"id": run.run_id, "name": run.directory.name, "dir": str(run.directory), "config": run.config}
        if self._init["mode"] == "online":
            given["resume"] = "allow"
        self._run = wandb.init(settings=settings, **{**given, **self._init})

    def write(self, numbers: dict[str, float], kind: str, step: int) -> None:
        """See `Tracker`."""
        self._run.log(numbers, step=step)

    def close(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=0 if outcome in ("finished", "interrupted") else 1)
