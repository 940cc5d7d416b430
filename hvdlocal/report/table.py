"""The table of runs: what each run was, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from hvdlocal.figures.units import bytes_text, seconds_text
from hvdlocal.report.lines import RunStyle, describe_period
from hvdlocal.report.records import RecordedState, Run
from hvdlocal.training.config import flatten

NONE = "–"


@dataclass(frozen=True)
class TableColumn:
    """A column of the table.

    Attributes:
        head: its heading.
        note: what stands below the heading in smaller letters: a unit, or what a symbol means.
        is_text: whether it holds words, which are aligned at the left.
        cells: one text for each run.
    """

    head: str
    note: str
    is_text: bool
    cells: list[str]


def run_table(lines: Sequence[RunStyle]) -> list[TableColumn]:
    """Returns the columns beside the runs' names, the results first."""
    runs = [line.run for line in lines]

    def column(head: str, note: str, cell: Callable[[Run], str], *, is_text: bool = False) -> TableColumn:
        return TableColumn(head, note, is_text, [cell(run) for run in runs])

    tasks = {run.task for run in runs}
    best_note = runs[0].task.best if len(tasks) == 1 else "of its metric"
    return [
        column("State", "", state_text, is_text=True),
        column("Best", best_note, best_text if len(tasks) == 1 else _named_best),
        *(column("Test", name, lambda run, name=name: _last(run, name)) for name in _metrics(runs)),  # type: ignore[misc]
        column("Model", "", lambda run: _setting(run, "model.name"), is_text=True),
        column("Data", "", lambda run: PurePath(_setting(run, "data.path")).name or NONE, is_text=True),
        column("Preset", "", lambda run: run.preset, is_text=True),
        column("K", "workers", workers_text),
        column("H", "steps", describe_period, is_text=True),
        column("Batch", "of a rank", lambda run: _setting(run, "data.batch_size")),
        column("Optimizer", "and γ, its rate", _optimizer, is_text=True),
        column("Progress", "epochs", lambda run: _epochs(run, "epoch")),
        column("Data", "epochs", lambda run: _epochs(run, "data_epoch")),
        column("Steps", "", lambda run: f"{run.num_steps:,}"),
        column("Averagings", "", lambda run: f"{run.num_averagings:,}" if run.ranks > 1 else NONE),
        column("Sent", "per rank", _sent),
        column("Sent", "% of parallel", lambda run: _number(run.data_parallel_share, 100, ".1f")),
        column("m", "Eq. 16", lambda run: _number(run.measured_m, 1, ".2f")),
        *(
            [
                column("Averaging", "exposed", lambda run: _time(run, "averaging")),
                column("Averaging", "hidden", _hidden),
            ]
            if any(run.seconds.get("hidden") for run in runs)
            else []
        ),
        column("Time", "", lambda run: _time(run, "elapsed")),
    ]


def describe(run: Run) -> str:
    """Describes a run and its best result in a sentence."""
    ranks = f"{run.ranks} rank{'s' if run.ranks > 1 else ''}"
    if run.island_size > 1:
        ranks += f" in islands of {run.island_size}"
    what = f"{_setting(run, 'model.name')} on {PurePath(_setting(run, 'data.path')).name}, {run.preset} on {ranks}"
    if run.best is None:
        return f"{what}: {state_text(run)}, not evaluated yet."
    return f"{what}: {state_text(run)}, best test {run.task.best} {best_text(run)} at epoch {run.best[1]:.1f}."


def state_text(run: Run) -> str:
    """Returns the state of a run, with its progress if it has not finished."""
    epoch = run.history.last("epoch")
    if run.state is RecordedState.FINISHED or epoch is None:
        return run.state.value
    return f"{run.state.value} at {100 * min(1.0, epoch / float(run.config['epochs'])):.0f} %"


def workers_text(run: Run) -> str:
    """Returns K, with the ranks of a worker if it is an island: "8", "2 × 4 ranks"."""
    return f"{run.num_workers} × {run.island_size} ranks" if run.island_size > 1 else str(run.num_workers)


def best_text(run: Run) -> str:
    """Returns the best value of the task's best metric."""
    return NONE if run.best is None else run.task.text(run.task.best, run.best[0])


def _named_best(run: Run) -> str:
    return NONE if run.best is None else f"{run.task.best} {best_text(run)}"


def _metrics(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys([*(run.task.best for run in runs), *(name for run in runs for name in run.metrics)]))


def _last(run: Run, name: str) -> str:
    value = run.evaluations.last(name)
    return NONE if value is None else run.task.text(name, value)


def _setting(run: Run, name: str) -> str:
    value: Any = flatten(run.config).get(name)
    return NONE if value is None else str(value)


def _optimizer(run: Run) -> str:
    return f"{_setting(run, 'optimizer.name')} {_setting(run, 'optimizer.lr')}, {_setting(run, 'schedule.name')}"


def _epochs(run: Run, name: str) -> str:
    return _number(run.history.last(name), 1, ".1f")


def _time(run: Run, name: str) -> str:
    return seconds_text(run.seconds[name]) if name in run.seconds else NONE


def _hidden(run: Run) -> str:
    """Returns the time for which averages were hidden behind steps, and its share of all their time."""
    spent = run.seconds
    if not spent.get("hidden") or "averaging" not in spent:
        return NONE
    share = spent["hidden"] / (spent["hidden"] + spent["averaging"])
    return f"{seconds_text(spent['hidden'])} ({100 * share:.0f} %)"


def _number(value: float | None, factor: float, form: str) -> str:
    return NONE if value is None else f"{factor * value:{form}}"


def _sent(run: Run) -> str:
    if run.ranks == 1:
        return NONE
    last = run.history["step"][-1:]
    return bytes_text(float(run.bytes_at(last)[0]) if len(last) else 0.0)
