"""Ranks die in the middle of things; the others are left with a result that is exactly theirs."""

from __future__ import annotations

import re
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


def test_islands_leave_until_none_is_left():
    """The job ends with the exit code for which the templates start it again."""
    result = start(8, str(Path(__file__).with_name("islands_that_leave.py")))
    assert result.code == 85, result.err
    assert re.findall("rank ([0-9]) is left", result.err) in (["6", "7"], ["7", "6"]), result.err
    left = re.findall("rank ([0-9]) of 8 on .* leaves the job, because its island has lost rank ([0-9])", result.err)
    assert sorted(left) == [("1", "0"), ("2", "3"), ("5", "4"), ("7", "6")]
