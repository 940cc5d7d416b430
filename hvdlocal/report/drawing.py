"""Drawings in panels: a page lays the panels out by its width, and a picture of its own holds all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D

from hvdlocal.figures.style import Figure, new_figure, style, verbatim

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title, xlabel: what stands above and below it.
        plot: draws the curves and sets the scales of the axes it is given.
    """

    title: str
    xlabel: str
    plot: Callable[[Axes], None]

    def draw(self, axes: Axes) -> None:
        """Draws the panel on axes."""
        self.plot(axes)
        axes.set(title=verbatim(self.title), xlabel=self.xlabel)


@dataclass(frozen=True)
class LegendEntry:
    """What a colour stands for, and its dashes if it has any."""

    label: str
    color: str
    dashes: Any = "solid"


@dataclass(frozen=True)
class Drawing:
    """Panels with a title, a caption and a legend for all of them.

    Attributes:
        name: name of its file.
        title, caption: words around it.
        panels: the panels, row after row.
        columns: the number of panels in a row, where there is room.
        legend: what the colours stand for; empty where nothing has to be told apart.
        width, height: size of a panel in inches.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    columns: int
    legend: Sequence[LegendEntry] = ()
    width: float = 3.2
    height: float = 2.5

    @property
    def columns_on_page(self) -> tuple[int, int]:
        """The number of panels in a row of a wide page and of one of half its width, where they remain readable."""
        wide = self.columns if self.columns <= 4 else 3 if self.columns % 3 == 0 else 4
        return wide, wide if wide < 4 else 2

    def panel_figures(self) -> list[Figure]:
        """Draws each panel as a figure of its own, without the legend."""
        figures = []
        with style():
            for panel in self.panels:
                figure, axes = new_figure(1, 1, width=self.width, height=self.height)
                panel.draw(axes[0][0])
                figures.append(figure)
        return figures

    def figure(self) -> Figure:
        """Draws all panels and the legend as one figure."""
        rows = -(-len(self.panels) // self.columns)
        with style():
            figure, axes = new_figure(rows, self.columns, width=self.width * self.columns, height=self.height)
            for panel, place in zip(self.panels, axes.flat, strict=False):
                panel.draw(place)
            for place in axes.flat[len(self.panels) :]:
                place.remove()
            if self.legend:
                handles = [Line2D([], [], color=entry.color, ls=entry.dashes) for entry in self.legend]
                labels = [verbatim(entry.label) for entry in self.legend]
                columns = max(1, int(11 * figure.get_figwidth()) // (8 + max(map(len, labels))))
                figure.legend(handles, labels, loc="outside upper left", ncols=columns)
        return figure
