"""Reads the records of a run from its directory: `config.yaml`, `environment.json` and `metrics.jsonl`.

The run may be running, finished or interrupted, and its files may have been copied from elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdlocal.report.task_metrics import TaskMetrics
from hvdlocal.terminal import plain
from hvdlocal.training.config import takes_local_steps
from hvdlocal.untrusted_files import from_json, from_yaml, read_lines, read_text

Column = npt.NDArray[np.float64]

SILENCE_SECONDS = 120.0
"""A run without an end counts as interrupted if metrics.jsonl has not grown for this long, for ten of its log intervals, and for
three times its longest pause so far (an evaluation may take long)."""

LARGEST = 1e100
"""Larger numbers cannot be statistics of a run, and are read as NaN."""

MOST_BYTES = 1 << 24
"""Largest size of config.yaml and of environment.json, which lists the hosts of all ranks."""

MOST_BYTES_OF_A_RECORD = 1 << 20
"""Longest line of metrics.jsonl."""

_NEEDED = {
    "steps": ("progress", "epoch", "data_epoch", "elapsed_seconds", "bytes_sent"),
    "round": ("progress", "epoch", "data_epoch", "elapsed_seconds", "round"),
    "evaluation": ("progress", "epoch", "data_epoch", "elapsed_seconds"),
    "end": ("steps", "micro_batches", "bytes_sent", "data_parallel_bytes", "seconds"),
}
_NO_METRICS = (*_NEEDED["steps"], "step", "samples")
"""The numbers in the record of an evaluation that are not metrics."""

_SPENT = ("elapsed", "computing", "averaging", "waiting_for_data", "evaluating")
_SPENT_LATER = ("inside_islands", "hidden")
"""Seconds that runs from before there were islands, or overlap, have not recorded."""


class RecordedState(Enum):
    """The state of a run."""

    FINISHED = "finished"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    DIVERGED = "diverged"


class Series:
    """Records of one kind as columns, in the order in which they were written."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        rows = list(records)
        self._length = len(rows)
        names = dict.fromkeys(name for row in rows for name, value in row.items() if _is_number(value))
        self._columns = {name: np.array([_number(row.get(name)) for row in rows]) for name in names}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, name: str) -> Column:
        """Returns a field's values; NaN where it is absent or null (NaN and infinity are recorded as null)."""
        return self._columns.get(name, np.full(self._length, np.nan))

    @property
    def names(self) -> list[str]:
        """The fields that hold a number in at least one record, in the order in which they were written."""
        return list(self._columns)

    def last(self, name: str) -> float | None:
        """Returns a field's last value; None if there is none or it is NaN."""
        column = self[name]
        return None if not len(column) or math.isnan(column[-1]) else float(column[-1])


@dataclass(frozen=True)
class Run:
    """The records of one run.

    Attributes:
        directory: the run's directory.
        config: the configuration, including all defaults.
        environment: how the job was started.
        steps: means over a log interval.
        rounds: the state after each averaging of a local method; empty for other methods.
        evaluations: evaluations of the averaged model on the test data.
        end: the last record of a run that finished, otherwise None.
        state: finished, running, interrupted or diverged.
        notes: remarks for the reader about interruptions, lost ranks and incomplete files.
    """

    directory: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    steps: Series
    rounds: Series
    evaluations: Series
    end: dict[str, Any] | None
    state: RecordedState
    notes: list[str] = field(default_factory=list)

    @property
    def preset(self) -> str:
        """The method's name."""
        return str(self.config["method"]["preset"])

    @property
    def is_local(self) -> bool:
        """Whether its replicas are averaged after local steps."""
        return takes_local_steps(self.preset)

    @property
    def ranks(self) -> int:
        """The processes of the run."""
        return int(self.environment["ranks"])

    @property
    def island_size(self) -> int:
        """n, the ranks that are one worker; 1 in runs from before there were islands."""
        return int(self.environment.get("island_size", 1))

    @property
    def num_workers(self) -> int:
        """K: islands, or ranks where an island is one rank."""
        return self.ranks // self.island_size

    @property
    def accumulate(self) -> int:
        """a, the micro-batches of a rank per optimizer step; for acc-lin and acc-ada it is the period."""
        method = self.config["method"]
        return int(method["period"]["period"] if self.preset.startswith("acc-") else method["accumulate"])

    @property
    def history(self) -> Series:
        """The finest record of the training state: one line per round, or per log interval if there are no rounds."""
        return self.rounds if len(self.rounds) else self.steps

    @property
    def num_steps(self) -> int:
        """Optimizer steps so far."""
        return int(max(s.last("step") or 0 for s in (self.steps, self.rounds, self.evaluations)))

    @property
    def num_averagings(self) -> int:
        """Averagings so far: the rounds of a local method, the steps of other methods."""
        return int(self.rounds.last("round") or 0) if self.is_local else self.num_steps

    @property
    def task(self) -> TaskMetrics:
        """What the task says about its metrics."""
        return TaskMetrics.of(self.environment)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of which an evaluation has recorded a value."""
        return [name for name in self.evaluations.names if name not in _NO_METRICS]

    @property
    def best(self) -> tuple[float, float] | None:
        """The best value of the task's best metric, and the epoch of its evaluation; None if there is none yet."""
        values = self.evaluations[self.task.best]
        if not np.isfinite(values).any():
            return None
        at = int(np.nanargmax(values) if self.task.largest else np.nanargmin(values))
        return float(values[at]), float(self.evaluations["epoch"][at])

    @property
    def data_parallel_share(self) -> float | None:
        """Bytes sent, divided by the bytes of averaging every micro-batch's gradient; None for one rank."""
        if self.end is not None:
            sent, parallel = self.end["bytes_sent"], self.end["data_parallel_bytes"]
        else:
            sent, parallel = self.steps.last("bytes_sent"), self.steps.last("data_parallel_bytes")
        return float(sent / parallel) if sent is not None and parallel else None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of rank 0 so far: elapsed, computing, averaging, inside_islands, waiting_for_data, evaluating, and hidden (for
        which averages were under way behind further steps); empty before the first line.
        """
        if self.end is not None:
            spent = self.end["seconds"]
            later = {name: _number(spent.get(name, 0.0)) for name in _SPENT_LATER}
            return later | {name: float(spent[name]) for name in _SPENT}
        found = {name: self.steps.last(f"{name}_seconds") for name in _SPENT}
        if not len(self.steps):
            return {}
        later = {name: self.steps.last(f"{name}_seconds") or 0.0 for name in _SPENT_LATER}
        return later | {name: value for name, value in found.items() if value is not None}

    @property
    def measured_m(self) -> float | None:
        """The m of Eq. 16: time of an averaging with its waits for the slowest rank, over that of a micro-batch without it.

        The time for which an averaging was hidden behind steps is part of it.
        """
        spent, averagings, batches = self.seconds, self.num_averagings, self.num_steps * self.accumulate
        if (
            self.num_workers == 1
            or not averagings
            or not batches
            or not spent.get("computing")
            or "averaging" not in spent
        ):
            return None
        averaging = spent["averaging"] + spent["hidden"]
        return (averaging / averagings) / ((spent["computing"] + spent["inside_islands"]) / batches)

    def bytes_at(self, steps: Column) -> Column:
        """Returns the bytes that rank 0 had sent for training after the given steps, interpolated between two records."""
        known = {0.0: 0.0}
        sent = 0.0
        rounds = self.rounds
        for step, total, of_round in zip(rounds["step"], rounds["bytes_sent"], rounds["round_bytes_sent"], strict=True):
            # Rounds were once recorded with the total.
            sent = total if not math.isnan(total) else sent + of_round
            if not math.isnan(sent):
                known[float(step)] = float(sent)
        totals = zip(self.steps["step"].tolist(), self.steps["bytes_sent"].tolist(), strict=True)
        known |= {step: count for step, count in totals if not math.isnan(count)}
        at = sorted(known)
        return np.interp(steps, at, [known[step] for step in at])


def read_run(directory: Path | str) -> Run:
    """Reads a run's directory.

    Raises:
        ValueError: the directory is not a run, or a file in it is damaged; the message gives the file and the remedy.
    """
    directory = Path(directory)
    try:
        return _read_run(directory)
    except OSError as error:  # for example, a file that is removed while it is read
        raise ValueError(f"{directory} cannot be read: {plain(error)}") from error


def _read_run(directory: Path) -> Run:
    _check(directory)
    config = _mapping(directory / "config.yaml")
    environment = _mapping(directory / "environment.json")
    for name, mistake in (
        ("config.yaml", _mistake_in_config(config)),
        ("environment.json", _mistake_in_environment(environment)),
    ):
        if mistake:
            raise ValueError(
                f"{directory / name} has no valid {mistake}, which hvdlocal train always writes: {directory} is not a run"
            )
    records, torn = read_records(directory / "metrics.jsonl")
    notes = _resumptions(directory / "attempts.jsonl") + _losses(records)
    if torn:
        notes.append("the last line of metrics.jsonl is incomplete and left out")
    end = records[-1] if records and records[-1]["kind"] == "end" else None
    return Run(
        directory,
        config,
        environment,
        steps=Series(r for r in records if r["kind"] == "steps"),
        rounds=Series(r for r in records if r["kind"] == "round"),
        evaluations=Series(r for r in records if r["kind"] == "evaluation"),
        end=end,
        state=_state(directory, config, records),
        notes=notes,
    )


def _check(directory: Path) -> None:
    if not directory.exists():
        raise ValueError(f"{directory}: no such directory; give the output directory of a run")
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file: give the run's directory, {directory.parent}")
    missing = [name for name in ("metrics.jsonl", "config.yaml", "environment.json") if not (directory / name).exists()]
    if not missing:
        return
    inside = len(list(directory.glob("*/metrics.jsonl")))
    if inside:
        raise ValueError(f"{directory} is not a run, but {inside} are in it: give {directory}/*")
    raise ValueError(
        f"{directory} is not a run: it has no {' and no '.join(missing)}; give the output directory of hvdlocal train, "
        "with config.yaml, environment.json and metrics.jsonl"
    )


def _mapping(path: Path) -> dict[str, Any]:
    text = read_text(path, MOST_BYTES)
    try:
        found = from_json(text) if path.suffix == ".json" else from_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is empty or damaged: copy it again")
    return found


def _mistake_in_config(config: Mapping[str, Any]) -> str | None:
    """Returns the first setting needed here that is absent or not as `hvdlocal train` writes it; None if there is none."""
    method = config.get("method")
    method = method if isinstance(method, dict) else {}
    period = method.get("period")
    period = period if isinstance(period, dict) else {}
    checks = {
        "epochs": _number(config.get("epochs")) > 0,
        "log_every_seconds": _number(config.get("log_every_seconds")) >= 0,
        "method.preset": _is_word(method.get("preset")),
        "method.accumulate": _is_count(method.get("accumulate")),
        "method.period.rule": _is_word(period.get("rule")),
        "method.period.period": _is_count(period.get("period")),
    }
    for name in ("h_base", "max_period"):
        checks[f"method.period.{name}"] = name in period and (period[name] is None or _is_count(period[name]))
    for name in ("alpha", "exponent"):
        checks[f"method.period.{name}"] = name in period and (period[name] is None or _is_number(period[name]))
    return next((name for name, holds in checks.items() if not holds), None)


def _mistake_in_environment(environment: Mapping[str, Any]) -> str | None:
    """Returns the first fact needed here that is not as `hvdlocal train` writes it; None if there is none."""
    ranks, size = environment.get("ranks"), environment.get("island_size", 1)
    if not _is_count(ranks):
        return "ranks"
    return None if _is_count(size) and ranks % size == 0 else "island_size"


def read_records(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Reads metrics.jsonl.

    Returns:
        The records, and whether the last line was incomplete and left out, as it may be for a running or killed job.

    Raises:
        ValueError: the file cannot be read, or a line is damaged; the message gives the line and the remedy.
    """
    records: list[dict[str, Any]] = []
    broken: tuple[int, ValueError] | None = None
    step = 0
    for number, line in enumerate(read_lines(path, MOST_BYTES_OF_A_RECORD), 1):
        if not line.strip():
            continue
        if broken is not None:  # the broken line was not the last one
            break
        try:
            record = from_json(line)
        except ValueError as error:
            broken = number, error
            continue
        if mistake := _mistake(record, step):
            raise ValueError(f"{path}, line {number}: {mistake}")
        step = record["step"]
        records.append(record)
    else:
        return records, broken is not None
    number, reason = broken
    raise ValueError(f"{path}, line {number} is damaged ({reason}): copy the file again") from reason


def _mistake(record: Any, step_before: int) -> str | None:
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str) or not _is_step(record.get("step")):
        return "not a record of hvdlocal train, which has a kind and a step"
    kind = record["kind"]
    needed = _NEEDED.get(kind, ())
    if missing := [name for name in needed if name not in record]:
        return f"a record of kind {kind!r} without {', '.join(missing)}: read it with the version that wrote it"
    if kind == "end":
        spent = record["seconds"]
        odd = [name for name in needed if name != "seconds" and not _is_step(record[name])]
        if not isinstance(spent, dict) or not all(math.isfinite(_number(spent.get(name))) for name in _SPENT):
            odd.append("seconds")
    else:
        odd = [name for name in needed if record[name] is not None and not _is_number(record[name])] if needed else []
    if odd:
        return f"{odd[0]} of a record of kind {kind!r} is not a valid number: copy the file again"
    if record["step"] < step_before:
        return f"goes back from step {step_before} to {record['step']}: these are two runs in one file, keep one"
    return None


def _resumptions(path: Path) -> list[str]:
    """Returns a note about interruptions, if the list of attempts exists and has more than one entry."""
    if not path.exists():
        return []
    attempts = []
    for line in read_lines(path, MOST_BYTES_OF_A_RECORD):
        try:
            attempt = from_json(line)
        except ValueError:  # an incomplete line
            continue
        if isinstance(attempt, dict) and _is_step(attempt.get("step")) and _is_count(attempt.get("ranks")):
            attempts.append(f"step {attempt['step']:,} on {attempt['ranks']} ranks")
    return [f"interrupted and resumed from {', '.join(attempts[1:])}"] if len(attempts) > 1 else []


def _losses(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns a note for each time that ranks were lost and the others went on."""
    notes = []
    for record in records:
        ranks, hosts, remaining = record.get("ranks"), record.get("hosts"), record.get("remaining")
        if record["kind"] != "lost" or not (
            isinstance(ranks, list) and isinstance(hosts, list) and _is_count(remaining)
        ):
            continue
        named = ", ".join(f"{rank} on {host!s:.80}" for rank, host in zip(ranks, hosts, strict=False) if _is_step(rank))
        verb = "went on without rank" if len(ranks) == 1 else "went on without ranks"
        who = "one rank" if remaining == 1 else f"{remaining} ranks"
        notes.append(f"after step {record['step']:,} {who} {verb} {named}")
    return notes


def _state(directory: Path, config: dict[str, Any], records: list[dict[str, Any]]) -> RecordedState:
    if records and records[-1]["kind"] == "end":
        return RecordedState.FINISHED
    written = (directory / "metrics.jsonl").stat().st_mtime
    last_good = directory / "last_good.pt"  # written when a run diverges, just before metrics.jsonl is closed
    if last_good.exists() and written < last_good.stat().st_mtime + SILENCE_SECONDS:
        return RecordedState.DIVERGED
    times = [_number(record.get("elapsed_seconds")) for record in records]
    times = [seconds for seconds in times if math.isfinite(seconds)]
    pause = max((later - earlier for earlier, later in pairwise(times)), default=0.0)
    silence = max(SILENCE_SECONDS, 10 * float(config["log_every_seconds"]), 3 * pause)
    return RecordedState.RUNNING if time.time() - written < silence else RecordedState.INTERRUPTED


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_count(value: Any) -> bool:
    return _is_step(value) and 0 < value < 2**31


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 40


def _number(value: Any) -> float:
    return float(value) if _is_number(value) and abs(value) <= LARGEST else math.nan
