"""The figure and the table of what benchmarks/utilisation.py has measured over several links.

python benchmarks/utilisation_figure.py runs/benchmarks/utilisation-*.json --figure docs/utilisation.svg
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import PercentFormatter

from hvdlocal.figures.style import COLORS, Figure, new_figure, save, style

FAMILIES = {
    "data parallel": "data parallelism",
    "local": "local steps",
    "overlap 4": "overlap, τ = 4",
    "overlap H": "overlap, τ = H",
    "islands": "islands of two",
}


class Measured:
    """The results over all links.

    Args:
        files: contents of the files that benchmarks/utilisation.py wrote.
    """

    def __init__(self, files: Sequence[dict[str, Any]]) -> None:
        self.links = sorted({one["gigabits"] or math.inf for one in files})
        self._rows = {
            (one["gigabits"] or math.inf, row["family"], row["period"]): row for one in files for row in one["methods"]
        }
        self.periods = sorted({period for _, _, period in self._rows if period})
        self.fractions = {one["gigabits"]: one["fraction"] for one in files if one["machine"]["ranks"] == 2}

    def of(self, family: str, period: int) -> list[tuple[float, float] | None]:
        """Returns utilisation by measurement and prediction over each link, or None where it was not measured."""
        found = [self._rows.get((link, family, 0 if family == "data parallel" else period)) for link in self.links]
        return [row and (row["measured"], row["predicted"]) for row in found]


def link_text(gigabits: float) -> str:
    """Returns a link's rate for people."""
    if math.isinf(gigabits):
        return "no limit"
    return f"{gigabits:g} Gbit/s" if gigabits >= 1 else f"{1000 * gigabits:g} Mbit/s"


def table(measured: Measured) -> str:
    """Returns utilisation as a table in Markdown: measured, and in brackets predicted."""
    lines = [f"| | H | {' | '.join(map(link_text, measured.links))} |", "|---" * (len(measured.links) + 2) + "|"]
    for family, label in FAMILIES.items():
        for period in measured.periods if family != "data parallel" else (0,):
            cells = measured.of(family, period)
            if any(cells):
                texts = [f"{100 * cell[0]:.0f} % ({100 * cell[1]:.0f})" if cell else "–" for cell in cells]
                lines.append(f"| {label} | {period or '–'} | {' | '.join(texts)} |")
    shares = [measured.fractions.get(link) for link in measured.links]
    texts = [f"{share:.2f}" if share else "–" for share in shares]
    return "\n".join([*lines, f"| fraction of the link's rate | – | {' | '.join(texts)} |"])


def figure(measured: Measured) -> Figure:
    """Draws utilisation over the links, one panel for each H; measured as a line, predicted as hollow marks."""
    with style():
        drawn, grid = new_figure(1, len(measured.periods), width=10, height=3.3, sharey=True)
        places = range(len(measured.links))
        for axes, period in zip(grid[0], measured.periods, strict=True):
            for color, (family, label) in zip(COLORS, FAMILIES.items(), strict=False):
                cells = [(x, *cell) for x, cell in zip(places, measured.of(family, period), strict=True) if cell]
                if cells:
                    x, found, model = zip(*cells, strict=True)
                    axes.plot(x, found, color=color, marker="o", label=label)
                    axes.plot(x, model, color=color, marker="o", mfc="none", ms=7, ls="none")
            axes.set_title(f"H = {period}")
            axes.set_xticks(places, [f"{link:g}" if math.isfinite(link) else "no limit" for link in measured.links])
            axes.set_xlabel("Link, Gbit/s")
            axes.set_ylim(0, 1.08)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        grid[0, 0].set_ylabel("Time in which workers compute")
        handles, labels = grid[0, -1].get_legend_handles_labels()
        handles.append(grid[0, -1].plot([], [], color="black", marker="o", mfc="none", ms=7, ls="none")[0])
        drawn.legend(handles, [*labels, "predicted"], loc="outside lower center", ncols=len(handles))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="written by benchmarks/utilisation.py")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    measured = Measured([json.loads(file.read_text()) for file in arguments.files])
    print(table(measured))
    if arguments.figure:
        save(figure(measured), arguments.figure)


if __name__ == "__main__":
    main()
