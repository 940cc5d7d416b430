"""Figures of Balles, Teja S and Archambeau (TMLR 2024) that follow from a formula or from the published tables.

Fig. 3 shows Eq. 14. Figs. 4 and 5 show Tables 2 to 4, and Figs. 2, 6 and 11 insert their epochs into Eq. 16. Fig. 6 of the paper
also shows H = 1, which the tables do not have and which is missing here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from hvdlocal.averaging.gain import gain_ratio
from hvdlocal.figures.style import COLORS, DASHES, Figure, fit_scale, new_figure, powers_axis, style
from hvdlocal.papers.published import METHODS, TABLES, Table, read_table
from hvdlocal.plan.cost import pseudo_wall_clock
from hvdlocal.plan.crossover import crossovers, skyline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOR = dict(zip(METHODS, (COLORS[0], COLORS[2], COLORS[1], COLORS[4]), strict=True))
"""Colours of the methods; the adaptive methods, which most figures compare, have the two that differ most."""

WHO = {"acc-ada": "AdaScale, accumulated (acc-ada)", "local-ada": "LocalAdaScale (local-ada)"}
M_LABEL = "m: time of a synchronisation / of a local step"
TIME_LABEL = "Pseudo wall-clock T\n[epochs of one worker]"


def gain_figure(num_workers: int = 8) -> Figure:
    """Draws Fig. 3: the gain ratio ρ (Eq. 14) against σ²/G, and enlarged for small σ²/G, where it falls below 1."""
    periods = (1, 2, 4, 8, 16, 32, 64)
    with style():
        figure, axes = new_figure(1, 2, width=10, height=3.8)
        for panel, ratios in zip(axes[0], (np.geomspace(1e-1, 1e6, 300), np.linspace(0, 2, 200)), strict=True):
            for i, period in enumerate(periods):
                gains = [gain_ratio(1.0, ratio, num_workers, period) for ratio in ratios]
                color, dashes = COLORS[i % len(COLORS)], DASHES[period == 1]
                panel.plot(ratios, gains, color=color, ls=dashes, label=f"H = {period}")
            panel.set_xlabel("σ²/G")
            panel.set_ylabel("Gain ratio ρ")
        wide, narrow = axes[0]
        wide.set(xscale="log", title=f"K = {num_workers}", ylim=(0, num_workers * 1.12))
        wide.axhline(num_workers, color="#808080", lw=0.8)
        wide.annotate(f"K = {num_workers}: linear scaling", (1e-1, num_workers), (0, 3), textcoords="offset points")
        handles, labels = wide.get_legend_handles_labels()
        figure.legend(handles, ["H = 1 (AdaScale)", *labels[1:]], loc="outside right center")
        narrow.set(title="Little variance: below 1 for H > 2", xlim=(0, 2), ylim=(0, 2.5))
        narrow.axhline(1, color="#808080", lw=0.8)
        return figure


def skylines_figure() -> Figure:
    """Draws Fig. 2: pseudo wall-clock time against m at the best H, with a mark where local steps begin to win."""
    with style():
        figure, axes = new_figure(1, len(TABLES), height=4.2)
        for panel, name in zip(axes[0], TABLES, strict=True):
            table = read_table(name)
            m = np.linspace(0, 1.25 * max(_crossover(table, k) for k in table.workers), 200)
            for shade, workers in zip((0.45, 0.7, 1.0), table.workers, strict=True):
                for method in WHO:
                    _skyline(panel, table, method, workers, m, alpha=shade)
                _mark(panel, table, workers)
                panel.annotate(f"K = {workers}", (m[-1], _best(table, "acc-ada", workers, m[-1])), (3, 0), **_BESIDE)
            _frame(panel, m, table.title)
        axes[0][0].set_ylabel(TIME_LABEL)
        _legend(figure, axes)
        return figure


def accuracy_figure() -> Figure:
    """Draws Fig. 4: test accuracy against H, one row per data set, one column per K."""
    return _by_period("Test accuracy [%]", METHODS, Table.accuracies, target=True)


def epochs_figure() -> Figure:
    """Draws Fig. 5: passes over the data of each method against H."""
    return _by_period("Epochs", METHODS, Table.epochs, log=True)


def periods_figure(num_workers: int = 24) -> Figure:
    """Draws Fig. 6: pseudo wall-clock time against m at a few periods, on CIFAR-10 and ImageNet32."""
    m = np.linspace(0, 10, 50)
    with style():
        figure, axes = new_figure(1, 2, width=10, height=3.8)
        for panel, name in zip(axes[0], ("cifar10", "imagenet32"), strict=True):
            table = read_table(name)
            for method, dashes in zip(WHO, DASHES, strict=True):
                for period, color in zip((2, 8, 32), COLORS, strict=False):
                    n = table.epochs(method, num_workers)[period]
                    times = [pseudo_wall_clock(n, num_workers, period, x) for x in m]
                    panel.plot(m, times, color=color, ls=dashes, label=f"{method}, H = {period}")
            _frame(panel, m, f"{table.title}, K = {num_workers}")
        axes[0][0].set_ylabel(TIME_LABEL)
        _legend(figure, axes, ncols=3)
        return figure


def tradeoffs_figure() -> Figure:
    """Draws Fig. 11: pseudo wall-clock time against m for every data set, K and H; the small numbers are H."""
    with style():
        figure, axes = new_figure(len(TABLES), 3, height=3.1)
        for row, name in zip(axes, TABLES, strict=True):
            table = read_table(name)
            for panel, workers in zip(row, table.workers, strict=True):
                m = np.linspace(0, max(10.0, 1.25 * _crossover(table, workers)), 200)
                # Larger times belong to periods that do not pay for any m on the axis.
                top = 1.8 * max(_best(table, method, workers, m[-1]) for method in WHO)
                for method in WHO:
                    _skyline(panel, table, method, workers, m)
                    _periods(panel, table, method, workers, m, top)
                _mark(panel, table, workers)
                _frame(panel, m, f"{table.title}, K = {workers}")
                panel.set(xlim=(-0.12 * m[-1], m[-1]), ylim=(0, top))
            row[0].set_ylabel(TIME_LABEL)
        _legend(figure, axes)
        return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "figure2_skylines": skylines_figure,
    "figure3_gain": gain_figure,
    "figure4_accuracy": accuracy_figure,
    "figure5_epochs": epochs_figure,
    "figure6_periods": periods_figure,
    "figure11_tradeoffs": tradeoffs_figure,
}
"""The figures by the name of their file."""


def crossover_table() -> list[tuple[str, int, list[float]]]:
    """Returns (data set, K, values of m at which the order of acc-ada and local-ada, each at its best H, changes)."""
    tables = [read_table(name) for name in TABLES]
    return [
        (table.title, workers, crossovers(table.epochs("acc-ada", workers), table.epochs("local-ada", workers)))
        for table in tables
        for workers in table.workers
    ]


# -- pieces ----------------------------------------------------------------------------------------------------------

_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7.5, "annotation_clip": True}


def _by_period(
    label: str,
    methods: tuple[str, ...],
    values: Callable[[Table, str, int], dict[int, int]] | Callable[[Table, str, int], dict[int, float]],
    *,
    target: bool = False,
    log: bool = False,
) -> Figure:
    with style():
        figure, axes = new_figure(len(TABLES), 3, height=2.7, sharey="row")
        for row, name in zip(axes, TABLES, strict=True):
            table = read_table(name)
            for panel, workers in zip(row, table.workers, strict=True):
                if target:
                    panel.axhline(table.target_percent, color="#808080", lw=0.8, label="one worker")
                for method in methods:
                    points = values(table, method, workers)
                    dashes = DASHES[method.endswith("-lin")]
                    panel.plot(list(points), list(points.values()), "o", color=COLOR[method], ls=dashes, label=method)
                powers_axis(panel, "x", table.periods)
                panel.set_title(f"{table.title}, K = {workers}")
            if log:
                everything = [n for method in methods for k in table.workers for n in values(table, method, k).values()]
                fit_scale(row[0], "y", everything, ratio=1)
            row[0].set_ylabel(label)
        for panel in axes[-1]:
            panel.set_xlabel("H: local steps, or accumulated batches")
        _legend(figure, axes, ncols=5)
        return figure


def _skyline(panel: Axes, table: Table, method: str, workers: int, m: np.ndarray, alpha: float = 1.0) -> None:
    times = [_best(table, method, workers, x) for x in m]
    panel.plot(m, times, color=COLOR[method], alpha=alpha, lw=2, label=f"{WHO[method]}, best H")


def _periods(panel: Axes, table: Table, method: str, workers: int, m: np.ndarray, top: float) -> None:
    """Draws a pale line for each H, with a label where there is room."""
    labelled = -top
    for period, n in table.epochs(method, workers).items():
        times = [pseudo_wall_clock(n, workers, period, x) for x in m]
        panel.plot(m, times, color=COLOR[method], alpha=0.3, lw=0.9)
        if labelled + 0.05 * top < times[0] < top:
            labelled, room = times[0], -3 if method == "local-ada" else -16
            panel.annotate(f"{period}", (0, labelled), (room, 0), **{**_BESIDE, "ha": "right", "color": COLOR[method]})


def _mark(panel: Axes, table: Table, workers: int) -> None:
    at = _crossover(table, workers)
    panel.plot(
        [at],
        [_best(table, "local-ada", workers, at)],
        "o",
        color="black",
        ms=4,
        label="local steps win from here on",
        ls="",
    )
    panel.annotate(f"{at:.1f}", (at, _best(table, "local-ada", workers, at)), (0, -10), **{**_BESIDE, "ha": "center"})


def _frame(panel: Axes, m: np.ndarray, title: str) -> None:
    panel.set(title=title, xlabel=M_LABEL, xlim=(0, m[-1]), ylim=(0, None))


def _legend(figure: Figure, axes: np.ndarray, ncols: int = 3) -> None:
    handles, labels = axes.flat[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))  # the darkest of each comes last
    figure.legend(unique.values(), unique.keys(), loc="outside upper left", ncols=ncols)


def _best(table: Table, method: str, workers: int, m: float) -> float:
    return skyline(table.epochs(method, workers), workers, m)


def _crossover(table: Table, workers: int) -> float:
    return crossovers(table.epochs("acc-ada", workers), table.epochs("local-ada", workers))[-1]
