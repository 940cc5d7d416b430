"""`hvdlocal figures [--output DIR] [--format svg]`: draws the paper's figures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hvdlocal.exit_codes import ExitCode


def run(arguments: Sequence[str]) -> int:
    """Draws the figures of Balles et al. that follow from formulas and published tables, and prints the crossovers of Eq. 16."""
    parser = argparse.ArgumentParser(
        prog="hvdlocal figures",
        description="Draw the figures of Balles et al. (TMLR 2024) that follow from its formulas and tables (2 to 6 and 11), and "
        "print from which m on local steps pay.",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("figures"), help="directory for the figures (default: figures)"
    )
    parser.add_argument("--format", choices=("svg", "png", "pdf"), default="svg", help="default: svg")
    options = parser.parse_args(arguments)

    from hvdlocal.figures.style import save
    from hvdlocal.papers.paper_figures import FIGURES, crossover_table

    options.output.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        path = options.output / f"{name}.{options.format}"
        save(draw(), path)
        print(path)
    print("\nLocalAdaScale overtakes AdaScale with accumulation, each at its best H, from this m on (Eq. 16):")
    for title, workers, crossovers in crossover_table():
        print(f"  {title:10}  K = {workers:2}   m = {', '.join(f'{m:.2f}' for m in crossovers)}")
    return ExitCode.FINISHED
