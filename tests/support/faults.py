"""Runs that tests/launch/faulty.py disturbs, and what they leave."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.launch import MPIRUN, ROOT, Result, environment, launch
from support.records import records

DEADLINE = 150.0
"""Of one job. On a quiet machine a few seconds are enough."""

LEFT_SECONDS = 5.0


@dataclass
class Run:
    """A configuration and what it writes to.

    Attributes:
        ranks: to start; 0 for a plain process.
        arguments: settings beside the configuration's.
        options: of mpirun.
    """

    config: Path
    output: Path
    ranks: int = 2
    arguments: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> list[int]:
        """Steps of the complete ones, in order."""
        return sorted(int(path.name[5:]) for path in self.output.glob("checkpoints/step-??????????"))

    def command(self, *faults: str) -> list[str]:
        start = [*MPIRUN, *self.options, "-np", str(self.ranks)] if self.ranks else []
        settings = [*self.arguments, "--output", str(self.output)]
        return [
            *start,
            sys.executable,
            str(ROOT / "tests/launch/faulty.py"),
            *faults,
            "train",
            str(self.config),
            *settings,
        ]

    def start(self, *faults: str, step: int | None = None, **env: str) -> Result:
        """To its end; then none of its processes is left, and it has gone on from `step`, else the newest checkpoint."""
        expected = self.checkpoints[-1:] if step is None else [step]
        result = launch(*self.command(*faults), timeout=DEADLINE, **env)
        assert len(re.findall("^faulty: rank . .* at ", result.err, re.M)) == len(faults), result.err
        pids = [int(pid) for pid in re.findall("^faulty: rank .* is process ([0-9]+)", result.err, re.M)]
        assert len(pids) == max(self.ranks, 1)
        assert none_left(pids)
        said = re.findall("continuing from the checkpoint of step ([0-9]+)", result.out)
        if result.code in (0, 85):
            assert [int(step) for step in said] == expected
        return result

    @contextmanager
    def started(self, *faults: str) -> Iterator[subprocess.Popen[str]]:
        """Waits for the first fault; the whole has the deadline of one job."""
        process = subprocess.Popen(
            self.command(*faults),
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        late = threading.Timer(DEADLINE, os.killpg, [process.pid, signal.SIGKILL])
        late.start()
        try:
            assert process.stderr is not None
            assert any(" at " in line for line in process.stderr if line.lstrip("\0").startswith("faulty: ")), (
                "no fault happened"
            )
            yield process
        finally:
            late.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def none_left(pids: list[int]) -> bool:
    """Soon: mpirun does not wait for those that it has just killed."""
    soon = time.monotonic() + LEFT_SECONDS
    while any(runs(pid) for pid in pids):
        if time.monotonic() > soon:
            return False
        time.sleep(0.05)
    return True


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def seconds_after(result: Result, ended: float) -> float:
    """From the fault to the end of the job."""
    (when,) = re.findall("^faulty: .* at .*, time ([0-9.]+)", result.err, re.M)
    return ended - float(when)


DIFFERS = re.compile("second|^loader_|memory|^date$|^output$|^storage$|^engine$")
"""Fields in which the same run differs: how long it took, and where and with what it ran."""


def numbers(record: Any) -> Any:
    """A record without the fields that `DIFFERS` names."""
    if not isinstance(record, dict):
        return record
    return {name: numbers(value) for name, value in record.items() if not DIFFERS.search(name)}


def assert_the_same_models(one: Run, other: Run) -> None:
    for name in ("model.pt", "best.pt"):
        first, second = (torch.load(run.output / name, weights_only=True) for run in (one, other))
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == [], name


def assert_the_same(one: Run, other: Run) -> None:
    """Bit for bit, and every record of every step."""
    assert_the_same_models(one, other)
    recorded = [[numbers(record) for record in records(run.output)] for run in (one, other)]
    assert len(recorded[0]) == len(recorded[1])
    for a, b in zip(*recorded, strict=True):
        assert a == b
    summaries = [numbers(json.loads((run.output / "summary.json").read_text())) for run in (one, other)]
    assert summaries[0] == summaries[1]
