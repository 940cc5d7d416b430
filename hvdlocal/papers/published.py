"""The published tables, read from the CSV files beside this module."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources

METHODS = ("acc-ada", "acc-lin", "local-ada", "local-lin")


@dataclass(frozen=True)
class Cell:
    """A published result: test accuracy in percent (top-1 on CIFAR-10, otherwise top-5), and passes over the data."""

    accuracy_percent: float
    epochs: int


@dataclass(frozen=True)
class Table:
    """One data set's results.

    Attributes:
        title: name of the data set.
        number: number of the table in the paper.
        target_percent: accuracy of one worker, which the methods should reach (Sec. 6.1).
        cells: the results by (method, K, H).
    """

    title: str
    number: int
    target_percent: float
    cells: dict[tuple[str, int, int], Cell]

    @property
    def workers(self) -> list[int]:
        """The values of K."""
        return sorted({workers for _, workers, _ in self.cells})

    @property
    def periods(self) -> list[int]:
        """The values of H."""
        return sorted({period for _, _, period in self.cells})

    def epochs(self, method: str, num_workers: int) -> dict[int, int]:
        """Returns n(K, H) of a method by H."""
        return {p: c.epochs for (m, k, p), c in sorted(self.cells.items()) if (m, k) == (method, num_workers)}

    def accuracies(self, method: str, num_workers: int) -> dict[int, float]:
        """Returns the test accuracy of a method in percent, by H."""
        return {p: c.accuracy_percent for (m, k, p), c in sorted(self.cells.items()) if (m, k) == (method, num_workers)}


TABLES = {"cifar10": ("CIFAR-10", 2, 93.0), "imagenet32": ("ImageNet32", 3, 69.0), "imagenet": ("ImageNet", 4, 93.0)}
"""Title, number of the table, and target accuracy of each data set."""


@cache
def read_table(name: str) -> Table:
    """Reads the table of `cifar10`, `imagenet32` or `imagenet`.

    Raises:
        ValueError: there is no such table.
    """
    if name not in TABLES:
        raise ValueError(f"no published table {name!r}: choose one of {', '.join(TABLES)}")
    text = resources.files(__package__).joinpath(f"{name}.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    cells = {
        (method, int(row["K"]), int(row["H"])): Cell(float(row[f"{method} accuracy"]), int(row[f"{method} epochs"]))
        for row in rows
        for method in METHODS
    }
    return Table(*TABLES[name], cells)
