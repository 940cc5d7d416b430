"""The figures of a report: results and costs of runs, the behaviour of their methods, and the use of their time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.lines import Line2D

from hvdlocal.figures.style import COLORS, Figure, fit_scale, new_figure, powers_axis, style, verbatim
from hvdlocal.figures.units import BYTES, TIME, seconds_text, unit
from hvdlocal.report.lines import RunStyle
from hvdlocal.report.records import Column, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 300
"""Number of points per line; more would not be visible and would enlarge the page."""

PROGRESS = "Progress [scale-invariant epochs]"


@dataclass(frozen=True)
class Drawing:
    """A figure with its title and caption; `name` is the name of its file."""

    name: str
    title: str
    caption: str
    figure: Figure


def draw(lines: Sequence[RunStyle]) -> list[Drawing]:
    """Draws all figures for which there are records."""
    makers = (_test, _training, _statistics, _gain_grid, _time)
    with style():
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
    if not seen:
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
    figure, axes = new_figure(2, len(across), sharey="row", sharex="col", height=2.7)
    for column, (label, x) in enumerate(across):
        for line in seen:
            marker = "o" if len(line.run.evaluations) <= 40 and len(lines) <= 14 else ""
            for row, name, factor in ((0, "accuracy", 100), (1, "loss", 1)):
                y = factor * line.run.evaluations[name]
                axes[row][column].plot(x(line.run), y, marker=marker, **line.style)
                axes[row][column].plot(x(line.run)[-1:], y[-1:], "o", color=line.color)
        axes[1][column].set_xlabel(label)
        ends = np.array([x(line.run)[-1] for line in seen])
        if (
            column > 1 and (ends > 0).all() and ends.max() > 10 * ends.min()
        ):  # otherwise the cheap runs would shrink to a dot
            fit_scale(axes[1][column], "x", np.concatenate([[x(line.run)[0] for line in seen], ends]))
    axes[0][0].set_ylabel("Test accuracy [%]")
    axes[1][0].set_ylabel("Test loss")
    axes[0][0].set_ylim(*_accuracy_limits([100 * line.run.evaluations["accuracy"] for line in seen]))
    fit_scale(axes[1][0], "y", np.concatenate([line.run.evaluations["loss"] for line in seen]), ratio=8)
    _legend(figure, seen)
    caption = (
        "The average of all ranks on the test images, against what it cost. A scale-invariant epoch is the progress "
        "that a pass over the data makes at gain 1; elapsed time includes evaluations; bytes are those of one rank for "
        "training."
    )
    return Drawing("test", "Test accuracy and loss", caption, figure)


def _training(lines: Sequence[RunStyle]) -> Drawing | None:
    panels = [
        ("Training loss", _column("loss"), 10.0),
        ("Learning rate ρ·γ", _column("lr"), 50.0),
        ("Gain per micro-batch ρ/a", _effective_gain, 50.0),
        ("Period H [steps]", lambda run: run.rounds["period"], 6.0),
    ]
    caption = (
        "Loss of the training images, as recorded (means over a log interval or a round); the learning rate that is "
        "applied, gain included; the gain ρ (Eq. 14), divided by the number a of micro-batches accumulated for a step "
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
    columns = len(across)
    figure, axes = new_figure(
        len(down), columns, height=2.3, sharex=True, sharey="row", width=min(12.8, 2 + 3.6 * columns)
    )
    for i, first in enumerate(down):
        for j, second in enumerate(across):
            panel, (period, k) = axes[i][j], (first, second) if down is periods else (second, first)
            for line in cells.get((period, k), []):
                color = COLORS[presets.index(line.run.preset)]
                panel.plot(
                    *thin(line.run.history["epoch"], _effective_gain(line.run)), color=color, label=line.run.preset
                )
            panel.set_title(f"K = {k}, H = {period}")
            if i == len(down) - 1:
                panel.set_xlabel(PROGRESS if columns < 5 else "Progress [epochs]")
        axes[i][0].set_ylabel("Gain ρ, or r/H")
        axes[i][0].set_ylim(0)
    found = {label: h for panel in axes.flat for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    handles, labels = [found[preset] for preset in presets], [verbatim(preset) for preset in presets]
    figure.legend(handles, labels, loc="outside upper left", ncols=len(presets))
    caption = (
        "As in Figs. 12 and 13 of Balles et al.: ρ of LocalAdaScale beside the effective gain r/H of AdaScale with H "
        "accumulated micro-batches. At most K."
    )
    return Drawing("gain", "Gain by workers and period", caption, figure)


def _time(lines: Sequence[RunStyle]) -> Drawing | None:
    parts = [
        ("computing", COLORS[0]),
        ("averaging", COLORS[1]),
        ("waiting_for_data", COLORS[4]),
        ("evaluating", "#A8A8A8"),
    ]
    seen = [line for line in lines if len(line.run.seconds) > len(parts) and line.run.seconds["elapsed"] > 0]
    if not seen:
        return None
    figure, axes = new_figure(1, 1, height=0.9 + 0.26 * len(seen))
    panel = axes[0][0]
    at = np.arange(len(seen))[::-1]
    left = np.zeros(len(seen))
    for name, color in parts:
        share = np.array([100 * line.run.seconds[name] / line.run.seconds["elapsed"] for line in seen])
        panel.barh(at, share, left=left, color=color, height=0.72, edgecolor="white", label=name.replace("_", " "))
        for y, start, width in zip(at, left, share, strict=True):
            if width >= 4:
                ink = "black" if name in ("waiting_for_data", "evaluating") else "white"
                panel.annotate(f"{width:.0f}", (start + width / 2, y), ha="center", va="center", color=ink, fontsize=8)
        left += share
    for y, line in zip(at, seen, strict=True):
        panel.annotate(
            seconds_text(line.run.seconds["elapsed"]), (101, y), va="center", fontsize=8, annotation_clip=False
        )
    panel.set_yticks(at, [verbatim(line.name) for line in seen])
    panel.set(xlim=(0, 100), ylim=(-0.6, len(seen) - 0.4), xlabel="Share of the elapsed time [%]")
    panel.grid(False)
    figure.legend(loc="outside upper left", ncols=len(parts))
    caption = (
        "Times of rank 0. Averaging includes the wait for the slowest rank; computing is the remainder, including augmentation "
        "and record keeping."
    )
    return Drawing("time", "Where the time went", caption, figure)


# -- pieces ----------------------------------------------------------------------------------------------------------


def _against_progress(
    name: str,
    title: str,
    caption: str,
    lines: Sequence[RunStyle],
    panels: Sequence[tuple[str, Callable[[Run], Column], float]],
) -> Drawing | None:
    """Draws a panel for each quantity that some run has recorded.

    Args:
        name, title, caption: of the drawing.
        lines: the runs.
        panels: for each quantity its label, its values, and the ratio above which its axis is logarithmic.
    """
    drawn = []
    for label, values, ratio in panels:
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
    figure, axes = new_figure(1, len(drawn), height=3.1, width=3.2 * len(drawn), sharex=True)
    for panel, (label, curves, ratio) in zip(axes[0], drawn, strict=True):
        for line, x, y in curves:
            stepped = "steps-pre" if label.startswith("Period") else "default"
            marker = "o" if len(x) == 1 else ""
            panel.plot(x, y, lw=1.1, drawstyle=stepped, marker=marker, **line.style)
        panel.set(title=label, xlabel=PROGRESS)
        everything = np.concatenate([y for _, _, y in curves])
        # The upper decades of every curve remain visible, even beside a curve far above the others.
        lowest = min(y.max() for _, _, y in curves) / everything.max() if everything.max() > 0 else 1.0
        fit_scale(panel, "y", everything, ratio=ratio, floor=lowest * (1e-4 if label.startswith("Learning") else 1e-6))
        if label.startswith("Period"):
            _period_axis(panel, everything)
    shown = {id(line): line for _, curves, _ in drawn for line, _, _ in curves}
    _legend(figure, [line for line in lines if id(line) in shown])
    return Drawing(name, title, caption, figure)


def _period_axis(panel: Axes, periods: Column) -> None:
    """Labels an axis with whole numbers, or with powers of two if it is logarithmic."""
    if panel.get_yscale() == "log":
        top = int(np.ceil(np.log2(periods.max())))
        powers_axis(panel, "y", [2**i for i in range(0, top + 1, 1 + top // 8)])
    else:
        panel.set_ylim(0, periods.max() + 1)


def _legend(figure: Figure, lines: Sequence[RunStyle]) -> None:
    if len(lines) == 1:
        return
    looks = {verbatim(line.legend): line.legend_style for line in lines}
    handles = [Line2D([], [], **look) for look in looks.values()]
    columns = max(1, int(11 * figure.get_figwidth()) // (8 + max(map(len, looks))))
    figure.legend(handles, list(looks), loc="outside upper left", ncols=columns)


def _column(name: str) -> Callable[[Run], Column]:
    return lambda run: run.history[name]


def _effective_gain(run: Run) -> Column:
    gain, periods = run.history["gain"] / run.accumulate, run.rounds["period"]
    if run.end is not None and len(periods) > 1 and periods[-1] < periods[-2]:
        gain[-1] = np.nan  # the budget cut this round short, so that its gain is larger
    return gain


def _noise_to_signal(run: Run) -> Column:
    grad_sqr, grad_var = run.history["grad_sqr"], run.history["grad_var"]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(grad_sqr > 0, grad_var / grad_sqr, np.nan)


def _accuracy_limits(curves: Sequence[Column]) -> tuple[float, float]:
    """Returns limits that include all but the first quarter of each curve, so that differences at the end are visible."""
    late = np.concatenate([curve[len(curve) // 4 :] for curve in curves])
    if not np.isfinite(late).any():
        return 0.0, 100.0
    low, high = float(np.nanmin(late)), float(np.nanmax(late))
    room = max(0.05 * (high - low), 0.2)
    return max(0.0, low - room), high + room
