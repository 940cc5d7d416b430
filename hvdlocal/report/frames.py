"""The records of a run as a table of pandas."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hvdlocal.report.records import read_records
from hvdlocal.terminal import plain

if TYPE_CHECKING:
    from pandas import DataFrame

KINDS = ("round", "steps", "evaluation", "end")


def read_metrics(run: Path | str, kind: str | None = None) -> DataFrame:
    """Reads the records of a run, which may be running, finished or interrupted, into a table of pandas.

    Args:
        run: the output directory of the run, or its metrics.jsonl.
        kind: of the records to read: "round", "steps", "evaluation" or "end"; by default all of them, in one table.

    Returns:
        A row for each record, in the order of writing, and a column for each field of docs/records.md; of `end`, a field in a
        mapping is named with a dot, as in "seconds.elapsed". What a record does not have, or has as null, is NaN. An incomplete
        last line, as a running job may have it, is left out.

    Raises:
        ValueError: there are no such records, or a line is damaged; the message gives the file and the remedy.
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("hvdlocal.read_metrics needs pandas: pip install hvdlocal[pandas]") from error
    path = Path(run)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"{path} does not exist: give the output directory of hvdlocal train, or its metrics.jsonl")
    try:
        records, _ = read_records(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {plain(error)}") from error
    kinds = dict.fromkeys([*KINDS, *(record["kind"] for record in records)])
    if kind is not None and kind not in kinds:
        raise ValueError(f"{path} has no records of kind {kind!r}: choose one of {', '.join(kinds)}")
    table = pandas.json_normalize([record for record in records if kind in (None, record["kind"])])
    empty = table.columns[table.isna().all()]  # null in every record, of which pandas makes objects
    return table.astype(dict.fromkeys(empty, float))
