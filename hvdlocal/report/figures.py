"""The figures of a report: results and costs of runs, the behaviour of their methods, and the use of their time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hvdlocal.figures.style import COLORS, fit_scale, powers_axis, verbatim
from hvdlocal.figures.units import BYTES, TIME, seconds_text, unit
from hvdlocal.report.drawing import Drawing, LegendEntry, Panel
from hvdlocal.report.lines import RunStyle
from hvdlocal.report.records import Column, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 300
"""Number of points per line; more would not be visible and would enlarge the page."""

PROGRESS = "Progress [scale-invariant epochs]"

PARTS = {
    "computing": COLORS[0],
    "inside_islands": COLORS[2],
    "averaging": COLORS[1],
    "waiting_for_data": COLORS[4],
    "evaluating": "#A8A8A8",
}
"""What the time of a run is spent on, and the colours for it."""

HIDDEN = COLORS[3]
"""The colour of the time for which averages were hidden behind steps."""


def draw(lines: Sequence[RunStyle]) -> list[Drawing]:
    """Draws all figures for which there are records."""
    makers = (_test, _training, _statistics, _gain_grid, _time)
    return [drawing for make in makers if (drawing := make(lines)) is not None]


def thin(x: Column, y: Column, points: int = POINTS) -> tuple[Column, Column]:
    """Averages x and y over equal intervals of x, so that a few long rounds weigh as much as many short ones.

    Args:
        x: values in ascending order.
        y: values, one for each x; NaN is left out.
        points: the largest number of points that remain; fewer points are returned unchanged.
    """
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= points or x[0] == x[-1]:
        return x, y
    bins = np.clip((x - x[0]) / (x[-1] - x[0]) * points, 0, points - 1).astype(int)
    counts = np.bincount(bins, minlength=points)
    full = counts > 0
    return tuple(np.bincount(bins, values, points)[full] / counts[full] for values in (x, y))  # type: ignore[return-value]


def plateaus(x: Column, y: Column) -> tuple[Column, Column]:
    """Removes NaN, and points between two others of the same y, without which a staircase looks the same."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    keep = np.ones(len(y), dtype=bool)
    keep[1:-1] = (y[1:-1] != y[:-2]) | (y[1:-1] != y[2:])
    return x[keep], y[keep]


# -- figures ---------------------------------------------------------------------------------------------------------


def _test(lines: Sequence[RunStyle]) -> Drawing | None:
    seen = [line for line in lines if len(line.run.evaluations)]
    names = _metrics(seen)
    if not names:
        return None
    time_unit = unit([float(line.run.evaluations["elapsed_seconds"][-1]) for line in seen], TIME, 3)
    sent = [line.run.bytes_at(line.run.evaluations["step"]) for line in seen]
    bytes_unit = unit([float(values[-1]) for values in sent], BYTES, 3)
    across: list[tuple[str, Callable[[Run], Column]]] = [
        (PROGRESS, lambda run: run.evaluations["epoch"]),
        ("Passes over the data [epochs]", lambda run: run.evaluations["data_epoch"]),
        (f"Elapsed time [{time_unit[0]}]", lambda run: run.evaluations["elapsed_seconds"] / time_unit[1]),
    ]
    if any(values[-1] > 0 for values in sent):
        across.append(
            (f"Sent by a rank [{bytes_unit[0]}]", lambda run: run.bytes_at(run.evaluations["step"]) / bytes_unit[1])
        )
    # What chooses the best model, and the loss, are shown against every cost, other metrics against progress alone.
    costly = [name for name in names if name == "loss" or any(name == line.run.task.best for line in seen)]
    panels = [
        Panel(f"Test {_label(seen, name)}", label, partial(_plot_metric, drawn, name, x, costs=column > 1))
        for name in names
        for column, (label, x) in enumerate(across if name in costly else across[:1])
        if (drawn := [line for line in seen if name in line.run.metrics and x(line.run)[-1] > 0])
    ]
    caption = (
        "The average of all ranks on the test data, against what it cost. A scale-invariant epoch is the progress that a "
        "pass over the data makes at gain 1; elapsed time includes evaluations; bytes are those that one rank sends to other "
        "workers for training."
    )
    title = f"Test {names[0]}" if len(names) == 1 else f"Test {', '.join(names[:-1])} and {names[-1]}"
    return Drawing("test", title, caption, panels, len(across), _legend(seen))


def _metrics(lines: Sequence[RunStyle]) -> list[str]:
    """Returns the metrics to draw: those by which the best models are chosen, then the loss, then all others."""
    recorded = [name for line in lines for name in line.run.metrics]
    first = [line.run.task.best for line in lines]
    return [name for name in dict.fromkeys([*first, "loss", *recorded]) if name in recorded]


def _label(lines: Sequence[RunStyle], name: str) -> str:
    return next(line.run.task.label(name) for line in lines if name in line.run.metrics)


def _plot_metric(
    lines: Sequence[RunStyle], name: str, x: Callable[[Run], Column], axes: Axes, *, costs: bool = False
) -> None:
    """Plots a metric of all evaluations against one of their costs, which is above 0."""
    curves = [line.run.task.factor(name) * line.run.evaluations[name] for line in lines]
    for line, y in zip(lines, curves, strict=True):
        marker = "o" if len(y) <= 40 and len(lines) <= 14 else ""
        axes.plot(x(line.run), y, marker=marker, **line.style)
        axes.plot(x(line.run)[-1:], y[-1:], "o", color=line.color)
    ends = np.array([x(line.run)[-1] for line in lines])
    if costs and ends.max() > 10 * ends.min():  # otherwise the cheap runs would shrink to a dot
        fit_scale(axes, "x", np.concatenate([[x(line.run)[0] for line in lines], ends]))
    best = [line.run.task for line in lines if line.run.task.best == name]
    if best and best[0].largest:
        axes.set_ylim(*_limits(curves, best[0].factor(name)))
    else:
        fit_scale(axes, "y", np.concatenate(curves), ratio=8)


def _training(lines: Sequence[RunStyle]) -> Drawing | None:
    panels = [
        ("Training loss", _column("loss"), 10.0),
        ("Learning rate ρ·γ", _column("lr"), 50.0),
        ("Gain per micro-batch ρ/a", _effective_gain, 50.0),
        ("Period H [steps]", lambda run: run.rounds["period"], 6.0),
    ]
    caption = (
        "Loss of the training data, as recorded (means over a log interval or a round); the learning rate that is "
        "applied, gain included; the gain ρ (Eq. 14), divided by the number a of micro-batches of a worker's step "
        "(App. H.4); the local steps from one averaging to the next. The budget may cut the last round short; its gain "
        "is left out."
    )
    return _against_progress("training", "Training, gain and period", caption, lines, panels)


def _statistics(lines: Sequence[RunStyle]) -> Drawing | None:
    panels = [
        ("G, squared norm of the gradient", _column("grad_sqr"), 10.0),
        ("σ², variance of a gradient", _column("grad_var"), 10.0),
        ("σ²/G", _noise_to_signal, 10.0),
        ("Divergence of the replicas", _column("divergence"), 10.0),
    ]
    caption = (
        "Moving averages of G = ‖∇f‖² and of the variance σ² of one rank's gradient of a micro-batch (Eq. 15), and "
        "their ratio, which sets the gain; (1/K) Σ ‖w_k − w̄‖² before an averaging (V of Eq. 22), which theory bounds "
        "by (H−1) γ² σ²."
    )
    return _against_progress("statistics", "Gradient statistics and divergence", caption, lines, panels)


def _gain_grid(lines: Sequence[RunStyle]) -> Drawing | None:
    """Draws Figs. 12 and 13 if the runs form such a grid."""
    cells: dict[tuple[int, int], list[RunStyle]] = {}
    for line in lines:
        method = line.run.config["method"]
        if line.run.preset.endswith(("-ada", "-ada-nostale")) and method["period"]["rule"] == "constant":
            cells.setdefault((method["period"]["period"], line.run.num_workers), []).append(line)
    periods, workers = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    presets = sorted({line.run.preset for cell in cells.values() for line in cell})
    if len(periods) < 2 or len(presets) < 2:
        return None
    down, across = (periods, workers) if len(workers) > 1 else (workers, periods)
    colors = {preset: COLORS[i] for i, preset in enumerate(presets)}
    panels = []
    for first in down:
        row = [(first, second) if down is periods else (second, first) for second in across]
        top = _largest_gain([line for cell in row for line in cells.get(cell, [])])
        panels += [
            Panel(f"K = {k}, H = {h}: ρ or r/H", PROGRESS, partial(_plot_gain, cells.get((h, k), []), colors, top))
            for h, k in row
        ]
    caption = (
        "As in Figs. 12 and 13 of Balles et al.: ρ of LocalAdaScale beside the effective gain r/H of AdaScale with H "
        "accumulated micro-batches. At most K."
    )
    legend = [LegendEntry(preset, color) for preset, color in colors.items()]
    return Drawing("gain", "Gain by workers and period", caption, panels, len(across), legend)


def _largest_gain(lines: Sequence[RunStyle]) -> float:
    gains = [gain for line in lines for gain in thin(line.run.history["epoch"], _effective_gain(line.run))[1]]
    return max(gains, default=1.0)


def _plot_gain(lines: Sequence[RunStyle], colors: Mapping[str, str], top: float, axes: Axes) -> None:
    for line in lines:
        x, y = thin(line.run.history["epoch"], _effective_gain(line.run))
        axes.plot(x, y, color=colors[line.run.preset])
    axes.set_ylim(0, 1.05 * top if top > 0 else 1)


def _time(lines: Sequence[RunStyle]) -> Drawing | None:
    seen = [
        line for line in lines if {*PARTS, "elapsed"} <= line.run.seconds.keys() and line.run.seconds["elapsed"] > 0
    ]
    if not seen:
        return None
    caption = (
        "Times of rank 0. Averaging includes the wait for the slowest rank; computing is the remainder, including augmentation "
        "and record keeping."
    )
    hidden = any(line.run.seconds["hidden"] for line in seen)
    if hidden:
        caption += " Hidden averages were under way during other work, mostly steps, and took no time of their own."
    panel = Panel("Share of the elapsed time [%]", "", partial(_plot_time, seen))
    islands = any(line.run.island_size > 1 for line in seen)
    spent = {name: color for name, color in PARTS.items() if islands or name != "inside_islands"}
    legend = [LegendEntry(name.replace("_", " "), color) for name, color in spent.items()]
    legend += [LegendEntry("hidden averaging", HIDDEN)] * hidden
    height = 0.8 + (0.36 if hidden else 0.26) * len(seen)
    return Drawing("time", "Where the time went", caption, [panel], 1, legend, width=5.0, height=height)


def _plot_time(lines: Sequence[RunStyle], axes: Axes) -> None:
    at = np.arange(len(lines))[::-1]
    left = np.zeros(len(lines))
    hidden = np.array([100 * line.run.seconds["hidden"] / line.run.seconds["elapsed"] for line in lines])
    axes.barh(at - 0.34, hidden, color=HIDDEN, height=0.22)  # below the bar, which becomes lower
    height, middle = (0.52, at + 0.06) if hidden.any() else (0.72, at)
    for name, color in PARTS.items():
        share = np.array([100 * line.run.seconds[name] / line.run.seconds["elapsed"] for line in lines])
        axes.barh(middle, share, left=left, color=color, height=height, edgecolor="white")
        for y, start, width in zip(middle, left, share, strict=True):
            if width >= 4:
                ink = "black" if name in ("waiting_for_data", "evaluating") else "white"
                axes.annotate(f"{width:.0f}", (start + width / 2, y), ha="center", va="center", color=ink, fontsize=8)
        left += share
    for y, line in zip(middle, lines, strict=True):
        axes.annotate(
            seconds_text(line.run.seconds["elapsed"]), (101, y), va="center", fontsize=8, annotation_clip=False
        )
    axes.set_yticks(at, [verbatim(line.name, 28) for line in lines])
    axes.set(xlim=(0, 100), ylim=(-0.6, len(lines) - 0.4))
    axes.grid(False)


# -- pieces ----------------------------------------------------------------------------------------------------------


def _against_progress(
    name: str,
    title: str,
    caption: str,
    lines: Sequence[RunStyle],
    quantities: Sequence[tuple[str, Callable[[Run], Column], float]],
) -> Drawing | None:
    """Draws a panel for each quantity that some run has recorded.

    Args:
        name, title, caption: of the drawing.
        lines: the runs.
        quantities: for each its label, its values, and the ratio above which its axis is logarithmic.
    """
    drawn = []
    for label, values, ratio in quantities:
        curves = []
        for line in lines:
            if label.startswith("Period"):
                x, y = plateaus(line.run.rounds["epoch"], values(line.run))
            else:
                x, y = thin(line.run.history["epoch"], values(line.run))
            if len(x) and y.any():
                curves.append((line, x, y))
        if curves:
            drawn.append((label, curves, ratio))
    if not drawn:
        return None
    panels = [Panel(label, PROGRESS, partial(_plot_history, label, curves, ratio)) for label, curves, ratio in drawn]
    shown = {id(line) for _, curves, _ in drawn for line, _, _ in curves}
    return Drawing(name, title, caption, panels, len(panels), _legend([line for line in lines if id(line) in shown]))


def _plot_history(label: str, curves: Sequence[tuple[RunStyle, Column, Column]], ratio: float, axes: Axes) -> None:
    for line, x, y in curves:
        stepped = "steps-pre" if label.startswith("Period") else "default"
        marker = "o" if len(x) == 1 else ""
        axes.plot(x, y, lw=1.1, drawstyle=stepped, marker=marker, **line.style)
    everything = np.concatenate([y for _, _, y in curves])
    # The upper decades of every curve remain visible, even beside a curve far above the others.
    lowest = min(y.max() for _, _, y in curves) / everything.max() if everything.max() > 0 else 1.0
    fit_scale(axes, "y", everything, ratio=ratio, floor=lowest * (1e-4 if label.startswith("Learning") else 1e-6))
    if label.startswith("Period"):
        _period_axis(axes, everything)


def _period_axis(panel: Axes, periods: Column) -> None:
    """Labels an axis with whole numbers, or with powers of two if it is logarithmic and they are short."""
    if panel.get_yscale() == "log":
        if periods.max() >= 1e7:
            return
        top = int(np.ceil(np.log2(periods.max())))
        powers_axis(panel, "y", [2**i for i in range(0, top + 1, 1 + top // 8)])
    else:
        panel.set_ylim(0, periods.max() + 1)


def _legend(lines: Sequence[RunStyle]) -> list[LegendEntry]:
    if len(lines) == 1:
        return []
    entries = {line.legend: LegendEntry(line.legend, line.legend_color or line.color, line.dashes) for line in lines}
    return list(entries.values())


def _column(name: str) -> Callable[[Run], Column]:
    return lambda run: run.history[name]


def _effective_gain(run: Run) -> Column:
    gain, periods = run.history["gain"] / (run.island_size * run.accumulate), run.rounds["period"]
    if run.end is not None and len(periods) > 1 and periods[-1] < periods[-2]:
        gain[-1] = np.nan  # the budget cut this round short, so that its gain is larger
    return gain


def _noise_to_signal(run: Run) -> Column:
    grad_sqr, grad_var = run.history["grad_sqr"], run.history["grad_var"]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(grad_sqr > 0, grad_var / grad_sqr, np.nan)


def _limits(curves: Sequence[Column], most: float) -> tuple[float, float]:
    """Returns limits that include all but the first quarter of each curve, so that differences at the end are visible."""
    late = np.concatenate([curve[len(curve) // 4 :] for curve in curves])
    if not np.isfinite(late).any():
        return 0.0, most
    low, high = float(np.nanmin(late)), float(np.nanmax(late))
    room = max(0.05 * (high - low), 2e-3 * max(abs(low), abs(high)), 1e-9)
    return low - room, high + room
