"""What a small experiment came to: numbers, claims, and a figure, written side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdlocal.directory import write_text

if TYPE_CHECKING:
    from hvdlocal.figures.style import Figure


@dataclass(frozen=True)
class ExperimentReport:
    """An experiment's outcome.

    Attributes:
        title: in a line.
        setting: what was done, in a paragraph.
        claims: sentences, the paper's or our own, and whether they hold here.
        header, table: numbers, as text.
        remarks: what the claims do not say, a paragraph each.
        record: all of it for programs.
        draw: the figure.
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
        """The report."""
        lines = [f"# {self.title}", "", self.setting, "", "| claim | here |", "|---|---|"]
        lines += [f"| {text} | {'yes' if holds else '**no**'} |" for text, holds in self.claims]
        lines += ["", f"| {' | '.join(self.header)} |", "|---" * len(self.header) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in self.table]
        for remark in self.remarks:
            lines += ["", remark]
        return "\n".join(lines) + "\n"

    def write(self, stem: Path) -> list[Path]:
        """Writes `stem`.md, .json and, with Matplotlib, .svg; returns their names."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        paths = [stem.with_suffix(".md"), stem.with_suffix(".json")]
        write_text(paths[0], self.markdown())
        claims = [{"claim": text, "here": holds} for text, holds in self.claims]
        record = {"title": self.title, "setting": self.setting, "claims": claims} | self.record
        write_text(paths[1], json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        try:
            from hvdlocal.figures.style import save
        except ImportError:
            return paths
        paths.append(stem.with_suffix(".svg"))
        save(self.draw(), paths[-1])
        return paths
