"""The page of settings gets a row for every setting."""

import runpy

from pages import ROOT

from hvdlocal.training import TrainConfig
from hvdlocal.training.settings import settings_of


def test_every_setting_has_a_row_with_a_text():
    tables = runpy.run_path(str(ROOT / "docs" / "settings_table.py"))["tables"]()
    rows = [line.strip("|").split(" | ") for line in tables.splitlines() if line.startswith("| `")]
    assert len(rows) == len(settings_of(TrainConfig)) > 60
    assert all(len(row) == 4 and row[1] and row[3].strip() for row in rows)
