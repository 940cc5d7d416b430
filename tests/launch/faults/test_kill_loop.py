"""Ten faults of benchmarks/kill_loop.py, at moments that differ from run to run; two hundred by hand."""

import sys

import pytest
from support.launch import ROOT, launch


@pytest.mark.timeout(1500)
def test_runs_that_are_hurt_come_to_the_same_bits():
    loop = launch(sys.executable, str(ROOT / "benchmarks/kill_loop.py"), "--kills", "10", "--seed", "1", timeout=1400)
    assert loop.code == 0, f"{loop.out}\n{loop.err}"
    assert "\n10 faults in " in loop.out
