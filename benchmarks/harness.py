"""Compares several ways to do the same work, each in its own process, in alternating trials on the same machine.

A trial counts samples for a fixed time, after a warm-up that uses up what a loader has prepared in advance. A slow moment of
the machine affects all candidates alike, so the ratio of two candidates is the median over the trials of the ratio within a
trial. Absolute figures are less reliable.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("hvdlocal", "torch", "torchvision", "numpy", "h5py", "pillow", "simplejpeg", "opencv-python-headless")
_TRIAL_SECONDS = 120  # a candidate that takes longer counts as stuck


@dataclass(frozen=True)
class Candidate:
    """One way to do the work.

    Attributes:
        name: label in the table.
        prepare: called with `arguments` in the candidate's process; yields the number of samples done since its last yield, every
            few milliseconds and without end. It must be importable.
        arguments: arguments of `prepare`.
        threads: number of torch's threads.
    """

    name: str
    prepare: Callable[..., Iterator[int]]
    arguments: tuple[Any, ...] = ()
    threads: int = 1


@dataclass
class Score:
    """The measurements of a candidate, one per trial, or the reason why it could not take part."""

    samples_per_second: list[float] = field(default_factory=list)
    samples_per_cpu_second: list[float] = field(default_factory=list)
    missing: str | None = None


def compare(
    title: str,
    candidates: Sequence[Candidate],
    *,
    trials: int,
    seconds: float,
    json_path: Path,
    extra_versions: Sequence[str] = (),
) -> dict[str, Score]:
    """Runs `trials` trials of every candidate, after one that is not counted.

    Prints a table, and writes every trial and the facts of the machine to `json_path`.

    Args:
        title: heading of the table.
        candidates: what to compare; the first one is the reference.
        trials: number of trials per candidate.
        seconds: length of a trial.
        json_path: the file for the results.
        extra_versions: packages whose versions are recorded beside the usual ones.
    """
    processes = {candidate.name: _Process(candidate) for candidate in candidates}
    scores = {name: Score() for name in processes}
    try:
        for trial in range(trials + 1):
            for name, process in processes.items():
                if scores[name].missing is not None:
                    continue
                answer = process.trial(seconds)
                if isinstance(answer, str):
                    scores[name].missing = answer
                elif trial > 0:
                    samples, wall_seconds, cpu_seconds = answer
                    scores[name].samples_per_second.append(samples / wall_seconds)
                    scores[name].samples_per_cpu_second.append(samples / cpu_seconds)
    finally:
        for process in processes.values():
            process.close()
    print(table(title, scores), flush=True)
    _write_json(json_path, title, scores, (*_LIBRARIES, *extra_versions))
    return scores


def table(title: str, scores: dict[str, Score]) -> str:
    """Returns medians and ranges as text; the ratios are those of the first candidate to each of the others."""
    first = next(iter(scores.values()))
    lines = [title, f"{'':36}{'samples/s':>11}  {'min … max':>21}{'per core':>11}{'first is':>10}{'per core':>10}"]
    for name, score in scores.items():
        if score.missing is not None:
            lines.append(f"{name:36}  took no part: {score.missing}")
            continue
        rates = score.samples_per_second
        ratios = [
            statistics.median(mine / theirs for mine, theirs in zip(ours, others, strict=False))
            for ours, others in (
                (first.samples_per_second, rates),
                (first.samples_per_cpu_second, score.samples_per_cpu_second),
            )
            if ours
        ] or [float("nan")] * 2
        spread = f"{min(rates):,.0f} … {max(rates):,.0f}"
        per_core = statistics.median(score.samples_per_cpu_second)
        lines.append(
            f"{name:36}{statistics.median(rates):11,.0f}  {spread:>21}{per_core:11,.0f}{ratios[0]:9.2f}×{ratios[1]:9.2f}×"
        )
    return "\n".join(lines)


def machine(libraries: Sequence[str] = _LIBRARIES) -> dict[str, Any]:
    """Returns what the figures depend on: date, processor, cores, versions."""
    versions = {}
    for name in libraries:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _write_json(path: Path, title: str, scores: dict[str, Score], libraries: Sequence[str]) -> None:
    results = {name: vars(score) for name, score in scores.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"title": title, "machine": machine(libraries), "results": results}, indent=2) + "\n")
    print(f"written to {path}")


class _Process:
    """A candidate's process, which runs a trial on request."""

    def __init__(self, candidate: Candidate) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, candidate))
        self._process.start()
        theirs.close()

    def trial(self, seconds: float) -> tuple[int, float, float] | str:
        """Runs a trial and returns (samples, seconds, CPU seconds), or a message if it failed."""
        try:
            self._connection.send(seconds)
            if not self._connection.poll(_TRIAL_SECONDS):
                return f"no answer within {_TRIAL_SECONDS} seconds"
            return self._connection.recv()  # type: ignore[no-any-return]
        except (EOFError, OSError):
            return "its process died"

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(timeout=10)


def _serve(connection: Connection, candidate: Candidate) -> None:
    torch.set_num_threads(candidate.threads)
    steps: Iterator[int] | None = None
    while True:
        try:
            seconds = connection.recv()
        except EOFError:
            return
        answer: tuple[int, float, float] | str
        try:
            if steps is None:
                steps = candidate.prepare(*candidate.arguments)
            _count(steps, seconds / 2)
            cpu, began = cpu_seconds(), time.perf_counter()
            samples = _count(steps, seconds)
            answer = samples, time.perf_counter() - began, cpu_seconds() - cpu
        except Exception as error:
            if not isinstance(error, ImportError):
                traceback.print_exc()
            answer = f"{type(error).__name__}: {error}"
        time.sleep(0.3)  # loaders fill their queues before the next candidate's trial
        connection.send(answer)


def _count(steps: Iterator[int], seconds: float) -> int:
    end, samples = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        samples += next(steps)
    return samples


def cpu_seconds() -> float:
    """Returns the CPU time that this process and all its descendants have used so far."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = sum(_ticks(pid) for pid in _descendants(os.getpid()))
    return time.process_time() + ended.ru_utime + ended.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])  # utime and stime
