"""The metrics of a run's task, as environment.json describes them: which one chooses the best model, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hvdlocal.figures.units import metric_text


@dataclass(frozen=True)
class TaskMetrics:
    """What a task says about its metrics; by default what image classification says, for runs that were recorded before tasks.

    Attributes:
        best: the metric by which the best model is chosen.
        largest: whether its largest value is the best, and not its smallest.
        percent: the metrics that are shown in percent.
    """

    best: str = "accuracy"
    largest: bool = True
    percent: tuple[str, ...] = ("accuracy", "top5")

    @classmethod
    def of(cls, environment: Mapping[str, Any]) -> TaskMetrics:
        """Reads the description in the contents of environment.json; what is not valid there is taken as absent."""
        task = environment.get("task")
        if (
            not isinstance(task, dict)
            or not isinstance(task.get("best"), str)
            or not isinstance(task.get("percent"), list)
        ):
            return cls()
        return cls(task["best"], task.get("direction") == "max", tuple(map(str, task["percent"])))

    def text(self, name: str, value: float) -> str:
        """Formats a metric's value with its unit: 98.66 %, 0.0312."""
        return metric_text(value, name in self.percent)

    def label(self, name: str) -> str:
        """Returns a metric's name with its unit: accuracy [%], loss."""
        return f"{name} [%]" if name in self.percent else name

    def factor(self, name: str) -> float:
        """Returns the factor by which a metric's values are multiplied to be shown in its unit."""
        return 100.0 if name in self.percent else 1.0
