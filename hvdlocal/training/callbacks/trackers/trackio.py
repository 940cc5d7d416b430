"""Trackio, in a local database."""

from __future__ import annotations

import os
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from hvdlocal.training.callbacks.base import Outcome, RunView
from hvdlocal.training.callbacks.trackers.base import Tracker


class Trackio(Tracker):
    """Writes to `trackio/` in the output directory, or to where the environment variable TRACKIO_DIR points.

    `TRACKIO_DIR=runs/a/trackio trackio show` shows it. A run that continues is the same run there; records that it writes again
    are left out.

    Args:
        project: the project's name.
        init: further arguments of `trackio.init`, such as `group` or `space_id`. Without `space_id` and `server_url`, and without
            the environment variables TRACKIO_SPACE_ID and TRACKIO_SERVER_URL, nothing is sent.
    """

    def __init__(self, project: str = "hvdlocal", **init: Any) -> None:
        self._project, self._init = project, init

    def on_start(self, run: RunView) -> None:
        """Begins or continues the run."""
        online = {"space_id", "server_url"} & set(self._init) or {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"} & set(
            os.environ
        )
        os.environ.setdefault("TRACKIO_DIR", str((run.directory / "trackio").absolute()))  # both are read at import
        if not online:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        name = f"{run.directory.name}-{run.run_id}"
        self._written: dict[str, int] = {}
        if run.resumed_step is not None:
            for row in SQLiteStorage.get_logs(self._project, name):
                for kind in {field.partition("/")[0] for field in row if "/" in field}:
                    self._written[kind] = max(self._written.get(kind, -1), row["step"])
        with redirect_stdout(StringIO()):  # a few lines for people at a notebook
            self._run = trackio.init(
                self._project,
                name=name,
                resume="allow",
                config=run.config,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
                **self._init,
            )

    def write(self, numbers: dict[str, float], kind: str, step: int) -> None:
        """See `Tracker`."""
        if step > self._written.get(kind, -1):
            self._run.log(dict(numbers), step=step)

    def close(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        import trackio

        with redirect_stdout(StringIO()):
            trackio.finish()  # rather than the run's own, which trackio would call again when Python ends
