"""Contests: several ways to do the same, each in a process of its own, taking turns on the same machine.

A turn is a stretch of time in which samples are counted, after a while in which they are not: what a loader prepared
before its turn must be used up first. A slow moment of the machine meets all of them alike: the ratio of two is the
median over the turns of the ratio within a turn. Absolute figures are worth less.
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
_TURN_SECONDS = 120  # longer, and a contestant counts as stuck


@dataclass(frozen=True)
class Contestant:
    """A way to do it.

    Attributes:
        name: what the table calls it.
        prepare: called with ``arguments`` in the contestant's process; yields without end, every few milliseconds or so, how
            many samples are done since it last did. Must be importable.
        arguments: of ``prepare``.
        threads: for torch.set_num_threads.
    """

    name: str
    prepare: Callable[..., Iterator[int]]
    arguments: tuple[Any, ...] = ()
    threads: int = 1


@dataclass
class Score:
    """What was measured of a contestant, turn by turn, or why it could not take part."""

    samples_per_second: list[float] = field(default_factory=list)
    samples_per_cpu_second: list[float] = field(default_factory=list)
    missing: str | None = None


def contest(
    title: str,
    contestants: Sequence[Contestant],
    *,
    turns: int,
    seconds: float,
    json_path: Path,
    extra_versions: Sequence[str] = (),
) -> dict[str, Score]:
    """Let all take ``turns`` turns of ``seconds``, after one that does not count.

    Prints a table; writes every turn and the machine to ``json_path``.
    """
    processes = {contestant.name: _Process(contestant) for contestant in contestants}
    scores = {name: Score() for name in processes}
    try:
        for turn in range(turns + 1):
            for name, process in processes.items():
                if scores[name].missing is not None:
                    continue
                answer = process.turn(seconds)
                if isinstance(answer, str):
                    scores[name].missing = answer
                elif turn > 0:
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
    """Medians and ranges; ratios are the first contestant's over each other's."""
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
    """What figures depend on: date, processor, cores, versions."""
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
    """A contestant's process, which works when it is told to."""

    def __init__(self, contestant: Contestant) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, contestant))
        self._process.start()
        theirs.close()

    def turn(self, seconds: float) -> tuple[int, float, float] | str:
        """(samples, seconds, CPU seconds), or what went wrong."""
        try:
            self._connection.send(seconds)
            if not self._connection.poll(_TURN_SECONDS):
                return f"no answer within {_TURN_SECONDS} seconds"
            return self._connection.recv()  # type: ignore[no-any-return]
        except (EOFError, OSError):
            return "its process died"

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(timeout=10)


def _serve(connection: Connection, contestant: Contestant) -> None:
    torch.set_num_threads(contestant.threads)
    steps: Iterator[int] | None = None
    while True:
        try:
            seconds = connection.recv()
        except EOFError:
            return
        answer: tuple[int, float, float] | str
        try:
            if steps is None:
                steps = contestant.prepare(*contestant.arguments)
            _count(steps, seconds / 2)
            cpu, began = cpu_seconds(), time.perf_counter()
            samples = _count(steps, seconds)
            answer = samples, time.perf_counter() - began, cpu_seconds() - cpu
        except Exception as error:
            if not isinstance(error, ImportError):
                traceback.print_exc()
            answer = f"{type(error).__name__}: {error}"
        time.sleep(0.3)  # loaders fill their queues before it is the next one's turn
        connection.send(answer)


def _count(steps: Iterator[int], seconds: float) -> int:
    end, samples = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        samples += next(steps)
    return samples


def cpu_seconds() -> float:
    """CPU time so far of this process and everything that it started."""
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
