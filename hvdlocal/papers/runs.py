"""The runs of a grid: their states and outcomes, and how the missing ones are run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from hvdlocal.directory import Directory, write_text
from hvdlocal.exit_codes import ExitCode
from hvdlocal.launch_command import ALLOW_ROOT, REFUSES_ROOT, last_words, refused_root
from hvdlocal.papers import run_sharpness
from hvdlocal.papers.launcher import Supervisor, train_command
from hvdlocal.papers.studies import GridPoint, Setup
from hvdlocal.training import TrainConfig
from hvdlocal.training.config_checks import effective_settings
from hvdlocal.training.run_files import SUMMARY, RunStatus, clear, find_status

DIVERGED = "diverged.json"
"""Marks the directory of a run that ended in NaN and would do so again."""


class GridRunState(Enum):
    """The state of a run of a grid."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    OPEN = "open"


@dataclass(frozen=True)
class GridRun:
    """A run of a grid, with its configuration.

    Attributes:
        point: its method, K, H and seed.
        directory: its output directory.
        arguments: arguments of `hvdlocal train`.
        config: the configuration that follows from the arguments.
    """

    point: GridPoint
    directory: Path
    arguments: list[str]
    config: TrainConfig

    @property
    def state(self) -> GridRunState:
        """The state, read from disk.

        Raises:
            ValueError: the directory holds a run with other settings.
        """
        found = find_status(self.directory, effective_settings(self.config), overwrite=False)
        if found is RunStatus.FINISHED:
            return GridRunState.FINISHED
        return GridRunState.DIVERGED if found is RunStatus.STARTED and self._marker.exists() else GridRunState.OPEN

    @property
    def log(self) -> Path:
        """The file for the output of the run."""
        return self.directory.parent / "logs" / f"{self.directory.name}.log"

    def mark_diverged(self, message: str) -> None:
        """Marks the run as ended in NaN."""
        write_text(self._marker, json.dumps({"message": message}) + "\n")

    def clear(self) -> None:
        """Removes the files of the run."""
        with Directory(self.directory) as directory:
            clear(directory)
        for left in (
            self._marker,
            self.directory / run_sharpness.FILE,
            self.directory / "config.yaml",
        ):  # which the next run replaces, if it is started
            left.unlink(missing_ok=True)

    def last_words(self) -> str:
        """Returns the last message of hvdlocal in the log, or else the last line."""
        output = self.log.read_text(encoding="utf-8", errors="replace")
        if refused_root(output):
            return f"{REFUSES_ROOT}: {ALLOW_ROOT} ({self.log})"
        return last_words(output, lambda line: line.startswith("hvdlocal"))

    @property
    def _marker(self) -> Path:
        return self.directory / DIVERGED


@dataclass(frozen=True)
class Outcome:
    """The outcome of a finished run; a diverged run has the accuracy of chance, and no epochs.

    Attributes:
        accuracy_percent: accuracy of the final average on the test images.
        epochs: passes over the data.
        seconds: duration from the first step to the last.
        diverged: whether the run ended in NaN.
        communication: bytes sent, relative to data parallelism.
    """

    accuracy_percent: float
    epochs: float | None
    seconds: float | None
    diverged: bool = False
    communication: float | None = None


def outcome(run: GridRun, setting: Setup) -> Outcome | None:
    """Returns the outcome of a run; None if it has not finished."""
    state = run.state
    if state is GridRunState.DIVERGED:
        return Outcome(setting.chance_percent, None, None, diverged=True)
    if state is GridRunState.OPEN:
        return None
    summary = json.loads((run.directory / SUMMARY).read_text(encoding="utf-8"))
    accuracy = 100 * summary["evaluation"][setting.measure]
    saved = summary.get("communication_saved")
    share = None if saved is None else 1 - saved
    return Outcome(accuracy, summary["data_epochs"], summary["seconds"]["elapsed"], communication=share)


def run_all(
    runs: Sequence[GridRun], launcher: Sequence[str], say: Callable[[str], None], after: Callable[[GridRun], None]
) -> int:
    """Runs everything that is not done, one run after the other.

    Args:
        runs: all runs of the grid.
        launcher: the words before the number of ranks; see `launcher_words`.
        say: prints a line.
        after: called with every run that has finished.

    Returns:
        FINISHED; FAILED if one failed (the others are tried unless two in succession fail for the same reason); INTERRUPTED if
        the current run was asked to stop, after which no other is started.
    """
    failed, reason = False, ""
    with Supervisor() as supervisor:
        for number, run in enumerate(runs, 1):
            if run.state is not GridRunState.OPEN:
                continue
            say(f"[{number}/{len(runs)}] {run.point.title} … {run.log}")
            run.log.parent.mkdir(parents=True, exist_ok=True)
            code = supervisor.run(train_command(launcher, run.point.workers, run.arguments), run.log)
            if code == ExitCode.DIVERGED:
                run.mark_diverged(run.last_words())
            elif code and (code == ExitCode.INTERRUPTED or supervisor.asked):
                say(f"interrupted: {run.last_words()}")
                return ExitCode.INTERRUPTED
            elif code:
                words = run.last_words()
                say(f"  failed with exit code {code}: {words}")
                failed, before, reason = True, reason, words.replace(run.directory.name, "")
                if reason == before:
                    say("the same as in the run before: the others are not tried")
                    return ExitCode.FAILED
                continue
            reason = ""
            after(run)
            if supervisor.asked:
                return ExitCode.INTERRUPTED
    return ExitCode.FAILED if failed else ExitCode.FINISHED
