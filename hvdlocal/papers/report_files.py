"""The files of a report: Markdown for people, JSON for programs, and a figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdlocal.directory import write_text

if TYPE_CHECKING:
    from hvdlocal.figures.style import Figure


def write_report(
    stem: Path, markdown: str | None, record: Mapping[str, Any], draw: Callable[[], Figure] | None
) -> list[Path]:
    """Writes `stem`.md, `stem`.json and, if Matplotlib is installed, `stem`.svg.

    Args:
        stem: path of the files without their suffixes; its directory is created if necessary.
        markdown: the report as text; None writes no text.
        record: the content of the JSON file.
        draw: makes the figure; None writes no figure.

    Returns:
        The paths of the files that were written.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    if markdown is not None:
        paths.append(stem.with_suffix(".md"))
        write_text(paths[-1], markdown)
    paths.append(stem.with_suffix(".json"))
    write_text(paths[-1], json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if draw is not None:
        try:
            from hvdlocal.figures.style import save
        except ImportError:
            return paths
        paths.append(stem.with_suffix(".svg"))
        save(draw(), paths[-1])
    return paths
