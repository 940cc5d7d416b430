"""The report of a small experiment: numbers, claims, and a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdlocal.papers.report_files import write_report

if TYPE_CHECKING:
    from hvdlocal.figures.style import Figure


@dataclass(frozen=True)
class ExperimentReport:
    """The result of an experiment.

    Attributes:
        title: a line.
        setting: a paragraph that describes the experiment.
        claims: statements, the paper's or our own, and whether they hold here.
        header, table: the numbers, as text.
        remarks: paragraphs with further observations.
        record: all results, for programs.
        draw: makes the figure.
    """

    title: str
    setting: str
    claims: Sequence[tuple[str, bool]]
    header: Sequence[str]
    table: Sequence[Sequence[str]]
    remarks: Sequence[str]
    record: dict[str, Any]
    draw: Callable[[], Figure]

    def markdown(self) -> str:
        """Returns the report as text."""
        lines = [f"# {self.title}", "", self.setting, "", "| claim | here |", "|---|---|"]
        lines += [f"| {text} | {'yes' if holds else '**no**'} |" for text, holds in self.claims]
        lines += ["", f"| {' | '.join(self.header)} |", "|---" * len(self.header) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in self.table]
        for remark in self.remarks:
            lines += ["", remark]
        return "\n".join(lines) + "\n"

    def write(self, stem: Path) -> list[Path]:
        """Writes `stem`.md, .json and, with Matplotlib, .svg; returns their names."""
        claims = [{"claim": text, "here": holds} for text, holds in self.claims]
        record = {"title": self.title, "setting": self.setting, "claims": claims} | self.record
        return write_report(stem, self.markdown(), record, self.draw)
