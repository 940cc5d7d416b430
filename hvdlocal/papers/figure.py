"""A study as a picture: accuracy and epochs against H, against c, or against what was sent, with what was published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdlocal.figures.style import COLORS, fit_scale, new_figure, powers_axis, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hvdlocal.papers.claims import Results
    from hvdlocal.papers.grid_report import Report
    from hvdlocal.papers.rule_report import RuleReport

_COLOR = {"acc-ada": COLORS[0], "local-ada": COLORS[1], "acc-lin": COLORS[2], "local-lin": COLORS[4]}
_OTHERS = {"local-ada-nostale": COLORS[3], "exact": COLORS[3]}


def draw(report: Report, path: Path) -> None:
    """Writes the figure: a row for each K; accuracies as points above or below the target, epochs in units of the budget."""
    with style():
        figure, axes = new_figure(len(report.workers), 2, width=9.5, height=3.2)
        for row, workers in zip(axes, report.workers, strict=True):
            lines = _over_weights if report.study.name == "fig10" else _over_periods
            lines(report, workers, row)
            row[0].axhline(0, color="#808080", lw=0.8)
            row[0].set(title=f"K = {workers}", ylabel="Accuracy less the target\n[points]")
            row[1].set(ylabel="Epochs / budget")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
    save(figure, path)


def draw_rules(report: RuleReport, path: Path) -> None:
    """Writes the figure: accuracy and sharpness of every rule against its communication, a point for each seed."""
    from hvdlocal.papers.rule_report import TITLES

    with style():
        figure, axes = new_figure(1, 2, width=9.5, height=3.4)
        for (name, runs), color in zip(report.runs.items(), COLORS, strict=False):
            known = [(100 * run.communication, run) for run in runs if run.communication is not None]
            for panel, points in zip(
                axes[0],
                (
                    [(share, run.accuracy) for share, run in known],
                    [(share, run.largest) for share, run in known if run.largest is not None],
                ),
                strict=True,
            ):
                if points:
                    shares, values = zip(*points, strict=True)
                    panel.plot(shares, values, ".", color=color, alpha=0.6)
                    mean = ([sum(shares) / len(shares)], [sum(values) / len(values)])
                    panel.plot(*mean, "o", color=color, ms=6, label=TITLES.get(name, name))
        for panel, label in zip(
            axes[0], ("Test accuracy [%]", "Largest eigenvalue of the Hessian\nof the training loss"), strict=True
        ):
            panel.set(xlabel="Bytes sent [% of data parallelism's]", ylabel=label)
            panel.set_xlim(0)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
    save(figure, path)


def _over_periods(report: Report, workers: int, panels: Sequence[Axes]) -> None:
    periods = report.periods(workers)
    sources: list[tuple[str, Results, float, Any]] = [
        ("", report.results(workers), report.scale.target_percent if report.scale else 0.0, "solid")
    ]
    published = {key: point for key, point in report.published(workers).items() if key[1] in periods}
    sources.append((", published", published, report.published_scale.target_percent, (0, (1, 1.5))))
    for method, color in (_COLOR | _OTHERS).items():
        for suffix, results, target, dashes in sources:
            mine = sorted(period for name, period in results if name == method)
            if not mine or (suffix and (method, mine[0]) not in report.results(workers)):
                continue
            heights = [results[method, period].accuracy_percent - target for period in mine]
            label = f"{method}{suffix}"
            marker = "" if suffix else "o"
            panels[0].plot(mine, heights, color=color, ls=dashes, marker=marker, label=label)
            known = [(period, epochs) for period in mine if (epochs := results[method, period].epochs) is not None]
            panels[1].plot(
                [p for p, _ in known], [e for _, e in known], color=color, ls=dashes, marker=marker, label=label
            )
    for panel in panels:
        powers_axis(panel, "x", periods)
        panel.set_xlabel("H: local steps, or accumulated batches")
    fit_scale(panels[1], "y", _all_epochs(report, workers), ratio=4)


def _over_weights(report: Report, workers: int, panels: Sequence[Axes]) -> None:
    results = report.results(workers)
    target = report.scale.target_percent if report.scale else 0.0
    for period, color in zip(report.periods(workers), COLORS, strict=False):
        mine = sorted((float(name.removeprefix("c=")), point) for (name, h), point in results.items() if h == period)
        weights = [c for c, _ in mine]
        panels[0].plot(
            weights, [p.accuracy_percent - target for _, p in mine], "o-", color=color, label=f"H = {period}"
        )
        panels[1].plot(weights, [p.epochs or float("nan") for _, p in mine], "o-", color=color)
    for panel in panels:
        panel.set_xlabel("c: weight of the local steps' bias")


def _all_epochs(report: Report, workers: int) -> list[float]:
    results: Results = report.results(workers)
    return [point.epochs for point in results.values() if point.epochs is not None]
