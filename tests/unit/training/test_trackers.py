"""The trackers write what metrics.jsonl has to their own files, also across an interruption, and reach for no network."""

import importlib.util
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.configs import digits_config
from support.datasets import write_three_classes
from support.records import records

from hvdlocal.communicator import SingleProcess
from hvdlocal.training import Trainer
from hvdlocal.training.callbacks.trackers.base import numbers_of
from hvdlocal.training.config import CheckpointConfig, MethodConfig, PeriodConfig

ROUNDS = {4 * number: float(number) for number in range(1, 7)}
"""The step of each round's end, with the number of the round."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write_three_classes(directory)
    return directory


@pytest.fixture
def train(data, tmp_path, monkeypatch):
    """Trains 24 steps in rounds of 4, and then again from the checkpoint of step 20: the last round is recorded twice."""
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)

    def refuse(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise AssertionError(f"an attempt to reach {address}")
        return connect(self, address)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)

    def train(*callbacks):
        output = tmp_path / "out"
        config = digits_config(
            data,
            output,
            data_batch_size=8,
            epochs=2.0,
            method=MethodConfig("local", PeriodConfig(period=4)),
            checkpoint=CheckpointConfig(every_steps=10),
            log_every_seconds=1e6,
            callbacks=list(callbacks),
        )
        Trainer(config, SingleProcess()).run()
        (output / "summary.json").unlink()  # as if it had been killed in its last moments
        Trainer(config, SingleProcess()).run()
        return output

    return train


def accuracies(output: Path) -> dict[int, float]:
    """The evaluations of a run, from metrics.jsonl."""
    return {record["step"]: record["accuracy"] for record in records(output, "evaluation")}


def run_id(output: Path) -> str:
    return json.loads((output / "environment.json").read_text())["run"]


def test_numbers():
    record = {"kind": "evaluation", "step": 3, "loss": 0.5, "psnr (dB)": 30, "top5": None, "is_best": True}
    record |= {"nan": float("nan"), "seconds": {"elapsed": 2.0}}
    assert numbers_of(record) == {"evaluation/loss": 0.5, "evaluation/psnr (dB)": 30, "evaluation/seconds/elapsed": 2.0}


def test_tensorboard(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = train("tensorboard")
    assert len(list((output / "tensorboard").iterdir())) == 2
    events = EventAccumulator(str(output / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("round/round")} == ROUNDS
    assert len(events.Scalars("round/round")) == len(ROUNDS)  # none of them twice
    written = {event.step: event.value for event in events.Scalars("evaluation/accuracy")}
    assert written == pytest.approx(accuracies(output))  # in float32


def test_mlflow(train):
    from mlflow.tracking import MlflowClient

    output = train({"name": "mlflow", "arguments": {"experiment": "digits"}})
    client = MlflowClient(tracking_uri=(output / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert (run.info.run_name, run.info.status) == ("out", "FINISHED")
    assert run.data.tags["hvdlocal.run"] == run_id(output)
    assert run.data.params["method.period.period"] == "4"
    history = client.get_metric_history(run.info.run_id, "round/round")
    assert [(metric.step, metric.value) for metric in history] == list(ROUNDS.items())
    history = client.get_metric_history(run.info.run_id, "evaluation/accuracy")
    assert {metric.step: metric.value for metric in history} == accuracies(output)


def test_names_that_mlflow_refuses(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    from hvdlocal.training.callbacks.trackers import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    run = client.create_run("0").info.run_id
    client.log_metric(run, mlflow._plain("evaluation/psnr (dB), μ"), 3.0)
    assert client.get_run(run).data.metrics == {"evaluation/psnr _dB__ μ": 3.0}


def wandb_records(path: Path) -> Iterator[bytes]:
    """Yields the records of a .wandb file: a LevelDB log, in blocks of 32 KiB, behind a head of 7 bytes."""
    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if (room := 2**15 - position % 2**15) < 7:
            position += room
            continue
        length, part = struct.unpack("<HB", content[position + 4 : position + 7])
        if position + 7 + length > len(content):
            return  # it is being written
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if part in (1, 4):  # the whole record, or its last part
            yield record
            record = b""


def test_wandb(train):
    from wandb.proto.wandb_internal_pb2 import Record

    output = train({"name": "wandb", "arguments": {"project": "digits", "tags": ["test"]}})
    parts = sorted((output / "wandb").glob(f"offline-run-*-{run_id(output)}*"))
    assert len(parts) == 2
    expected = [*ROUNDS.items(), (24, 6.0)]  # `wandb sync` puts the parts together
    deadline = time.monotonic() + 30
    rounds, runs = [], set()
    while rounds != expected and time.monotonic() < deadline:  # a process of wandb's writes them, also after the end
        time.sleep(0.1)
        rounds, runs = [], set()
        for part in parts:
            for content in wandb_records(part / f"run-{run_id(output)}.wandb"):
                record = Record.FromString(content)
                if record.HasField("run"):
                    runs.add((record.run.project, record.run.display_name, *record.run.tags))
                values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                if "round/round" in values:
                    rounds.append((record.history.step.num, float(values["round/round"])))
    assert runs == {("digits", "out", "test")}
    assert rounds == expected


TRACKIO = """
import sys
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("digits")
for row in SQLiteStorage.get_logs("digits", run):
    if "round/round" in row:
        print(row["step"], row["round/round"])
"""


@pytest.mark.skipif(
    importlib.util.find_spec("trackio") is None, reason="trackio is not installed (it needs pillow < 13)"
)
def test_trackio(train):
    output = train({"name": "trackio", "arguments": {"project": "digits"}})
    environment = {**os.environ, "TRACKIO_DIR": str(output / "trackio")}
    read = subprocess.run(
        [sys.executable, "-c", TRACKIO], env=environment, capture_output=True, text=True, timeout=100, check=True
    )
    assert [tuple(map(float, line.split())) for line in read.stdout.splitlines()] == list(ROUNDS.items())


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed(train, tmp_path, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None if module == name else find(module))
    with pytest.raises(
        ImportError, match=rf"callbacks={name} needs the package {name}: pip install hvdlocal\[{name}\]"
    ):
        train(name)
    assert not (tmp_path / "out").exists()
