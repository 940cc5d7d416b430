"""Five kills of benchmarks/survive.py, at moments that differ from run to run; a hundred by hand."""

import sys

import pytest
from support.launch import ROOT, launch


@pytest.mark.timeout(1500)
def test_ranks_killed_at_random():
    loop = launch(sys.executable, str(ROOT / "benchmarks/survive.py"), "--kills", "5", "--seed", "1", timeout=1400)
    assert loop.code == 0, f"{loop.out}\n{loop.err}"
    assert "\nall jobs, ended with" in loop.out
