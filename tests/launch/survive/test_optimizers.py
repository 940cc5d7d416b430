"""Own loops around the optimizers go on when ranks die, with the values of the ranks that are left."""

from __future__ import annotations

import sys
from pathlib import Path

from support.launch import MPIRUN, launch

SURVIVING = [*MPIRUN, "--with-ft", "ulfm", "-np"]


def test_until_one_is_left():
    program = Path(__file__).with_name("loops_that_lose_ranks.py")
    result = launch(*SURVIVING, "5", sys.executable, str(program), "0", timeout=300)
    assert result.code == 0, result.err
    assert "rank 1 is left" in result.err, result.err
