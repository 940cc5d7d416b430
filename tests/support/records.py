"""What a run has recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def records(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run, or those of one kind, from its output directory; a line that is being written does not count."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if kind in (None, record["kind"])]
