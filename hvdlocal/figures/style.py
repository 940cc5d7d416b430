"""The style of the figures: colours that colour-blind readers can tell apart, readable axes, and no global state.

Figures are made without pyplot, so that they depend neither on a display nor on the state of a caller's program.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
except ImportError as error:
    raise ImportError("figures need Matplotlib: pip install hvdlocal[figures]") from error

from hvdlocal.directory import user_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
"""Okabe and Ito's palette (2008) without its yellow, which vanishes on white, and with its black softened."""

DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.5)))
"""Line styles, which remain distinguishable in black and white."""

_STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "svg.fonttype": "path",  # the same look, whatever fonts a reader has
    "svg.hashsalt": "hvdlocal",  # the same figure gives the same file
}


@contextmanager
def style() -> Iterator[None]:
    """Draws and saves figures within the context in this package's style."""
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(
    rows: int, columns: int, *, width: float = 12.8, height: float = 2.9, **options: Any
) -> tuple[Figure, Any]:
    """Makes a figure of rows × columns axes.

    Args:
        rows, columns: numbers of axes.
        width: width of the figure in inches.
        height: height of a row in inches.
        options: further arguments of `Figure.subplots`.

    Returns:
        The figure, and its axes as a two-dimensional array.
    """
    figure = Figure(figsize=(width, height * rows))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure in the format that the path's suffix names."""
    options: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    with style(), user_file(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=160, **options)


def data_uri(figure: Figure) -> str:
    """Encodes a figure without its background as an SVG data URI, for a page that needs no other file."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def verbatim(text: str, most_characters: int = 60) -> str:
    """Escapes text for a figure: a $ would start a formula, and control characters are not valid in SVG.

    Args:
        text: for example, a name.
        most_characters: length from which the middle is left out.
    """
    half = most_characters // 2
    shown = text if len(text) <= most_characters else f"{text[:half]}…{text[-half:]}"
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in shown).replace(
        "$", r"\$"
    )


def powers_axis(axes: Axes, which: str, values: Sequence[int]) -> None:
    """Makes an axis logarithmic to base 2, with a labelled tick at each of the values."""
    getattr(axes, f"set_{which}scale")("log", base=2)
    axis = getattr(axes, f"{which}axis")
    axis.set_ticks([float(value) for value in values], [str(value) for value in values])
    axis.set_minor_locator(NullLocator())


def fit_scale(axes: Axes, which: str, values: npt.ArrayLike, *, ratio: float = 20.0, floor: float = 0.0) -> None:
    """Makes an axis logarithmic when the positive values span more than `ratio`.

    Args:
        axes: the axes to change.
        which: "x" or "y".
        values: all values that are drawn along the axis.
        ratio: ratio of the largest to the smallest value above which the axis becomes logarithmic.
        floor: the axis omits values below this share of the largest, for values that decay to zero.
    """
    array = np.asarray(values, dtype=float)
    positive = array[np.isfinite(array) & (array > 0)]
    if not len(positive):
        return
    low, high = max(positive.min(), floor * positive.max()), positive.max()
    axis = getattr(axes, f"{which}axis")
    if high / low <= ratio:
        axis.set_major_locator(MaxNLocator(nbins=5))
        return
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low / 1.25, high * 1.25)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 100 else (1.0,), numticks=7))
    axis.set_minor_formatter(NullFormatter())
    if low >= 1e-3 and high < 1e5:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
