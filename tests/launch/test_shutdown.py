"""`hvdlocal.init()` again after a shutdown."""

from __future__ import annotations

import sys

import pytest
from support.launch import MPIRUN, launch

SHUT_DOWN = """
import sys, torch, hvdlocal
if sys.argv[1] == "first":
    import mpi4py.MPI
communicators = []
for _ in range(3):
    communicators.append(hvdlocal.init())
    ones = torch.ones(2)
    communicators[-1].sum_(ones, "test.sum")
    sys.stderr.write(f"sum {ones.tolist()}, {len(set(map(id, communicators)))} communicators\\n")
    communicators[-1].shutdown()
    for dead in (lambda: communicators[-1].sum_(ones, "test.dead"), hvdlocal.communicator.current):
        try:
            dead()
        except RuntimeError as error:
            sys.stderr.write(f"refused: {error}\\n")
"""


@pytest.mark.parametrize(
    ("backend", "mpi4py", "works"),
    [("mpi4py", "later", True), ("torch", "later", True), ("horovod", "first", True), ("horovod", "later", False)],
)
def test_init_after_shutdown(backend, mpi4py, works):
    """A new communicator, or a refusal on every rank: never the dead one."""
    result = launch(*MPIRUN, "-np", "2", sys.executable, "-c", SHUT_DOWN, mpi4py, HVDLOCAL_BACKEND=backend)
    assert result.err.count("sum [2.0, 2.0], 1 communicators") == 2
    assert "refused: rank 0 of 2" in result.err
    assert "the collective 'test.dead' was called after shutdown()" in result.err
    if works:
        assert result.code == 0, result.err
        assert result.err.count("sum [2.0, 2.0], 3 communicators") == 2
        assert result.err.count("refused: hvdlocal is not initialised") == 6
    else:
        assert result.code == 1, result.err
        assert "hvdlocal.init() after shutdown(): with Horovod's shutdown MPI has ended" in result.err
        assert "2 communicators" not in result.err
