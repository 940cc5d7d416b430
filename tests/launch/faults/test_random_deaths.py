"""Ranks are killed at random times until one is left; a hundred by hand: `random_deaths.py` with more seeds."""

from __future__ import annotations

import sys

import pytest
from support.launch import MPIRUN, ROOT, launch

RANKS = 8


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_collective_is_that_of_the_survivors(seed):
    program = str(ROOT / "tests/launch/survive/random_deaths.py")
    result = launch(*MPIRUN, "--with-ft", "ulfm", "-np", str(RANKS), sys.executable, program, str(seed), timeout=240)
    assert result.code == 0, result.err
    assert "Traceback" not in result.err, result.err
    assert f" and {RANKS - 1} deaths in " in result.err, result.err
