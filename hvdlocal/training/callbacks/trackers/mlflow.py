"""MLflow's file store."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from hvdlocal.training.callbacks.base import Outcome, RunView
from hvdlocal.training.callbacks.trackers.base import Tracker

TAG = "hvdlocal.run"

STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "diverged": "FAILED", "failed": "FAILED"}


class MLflow(Tracker):
    """Writes to `mlflow/` in the output directory, or to where the environment variable MLFLOW_TRACKING_URI points.

    `mlflow server --backend-store-uri runs/a/mlflow` shows it. A run that continues is the same run there; records that it writes
    again are left out.

    Args:
        experiment: the experiment's name.
    """

    def __init__(self, experiment: str = "hvdlocal") -> None:
        self._experiment = experiment

    def on_start(self, run: RunView) -> None:
        """Begins or continues the run."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read at import
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow prefers a database, which needs SQLAlchemy
        from mlflow.tracking import MlflowClient

        where = os.environ.get("MLFLOW_TRACKING_URI") or (run.directory / "mlflow").absolute().as_uri()
        self._client = client = MlflowClient(tracking_uri=where)
        experiment = client.get_experiment_by_name(self._experiment)
        number = client.create_experiment(self._experiment) if experiment is None else experiment.experiment_id
        found = client.search_runs([number], filter_string=f"tags.`{TAG}` = '{run.run_id}'", max_results=1)
        self._written = self._last_steps(found[0]) if found else {}
        if found:
            self._id = found[0].info.run_id
            client.update_run(self._id, status="RUNNING")
            return
        self._id = client.create_run(number, run_name=run.directory.name, tags={TAG: run.run_id}).info.run_id
        for name, value in _flat(run.config):
            client.log_param(self._id, _plain(name), value)

    def write(self, numbers: dict[str, float], kind: str, step: int) -> None:
        """See `Tracker`."""
        if step <= self._written.get(kind, -1):
            return
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        self._client.log_batch(
            self._id, metrics=[Metric(_plain(name), number, now, step) for name, number in numbers.items()]
        )

    def close(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id, STATUS[outcome])

    def _last_steps(self, found: Any) -> dict[str, int]:
        """Returns the last step of each kind of record that the run has."""
        last: dict[str, int] = {}
        for name in found.data.metrics:
            kind = name.partition("/")[0]
            steps = [metric.step for metric in self._client.get_metric_history(found.info.run_id, name)]
            last[kind] = max([last.get(kind, -1), *steps])
        return last


def _plain(name: str) -> str:
    """Returns a name without the signs that MLflow refuses."""
    return "".join(sign if sign.isalnum() or sign in "_-. /" else "_" for sign in name)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the settings by their dotted names."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
