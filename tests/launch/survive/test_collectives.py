"""Ranks die in the middle of things; the others are left with a result that is exactly theirs."""

from __future__ import annotations

import sys
from pathlib import Path

from support.launch import MPIRUN, Result, launch

SURVIVING = [*MPIRUN, "--with-ft", "ulfm", "-np"]


def start(ranks: int, *program: str, **settings: str) -> Result:
    return launch(*SURVIVING, str(ranks), sys.executable, *program, **settings)


def test_until_one_is_left():
    result = start(8, str(Path(__file__).with_name("ranks_that_die.py")))
    assert result.code == 0, result.err
    assert "rank 5 is left" in result.err, result.err
