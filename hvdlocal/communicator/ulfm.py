"""Starts an MPI that outlives its ranks: user-level failure mitigation (ULFM), which Open MPI has since version 5.

Source: Open MPI's documentation, "User-Level Fault Mitigation"; which components survive is listed in its parameter set `ft-mpi`.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hvdlocal.communicator.errors import LaunchError
from hvdlocal.communicator.launched import launched_by_srun, launched_by_torchrun, launched_size

TRANSPORT, COLLECTIVES, FAULT_TOLERANCE = "OMPI_MCA_pml", "OMPI_MCA_coll", "OMPI_MCA_mpi_ft_enable"
"""Environment variables of Open MPI. mpirun sets the last one for its ranks when it is given --with-ft ulfm."""

START = "start the ranks with `mpirun --with-ft ulfm`"

NOT_SURVIVING = ("cuda", "han", "hcoll", "portals4")
"""Open MPI's components for collectives that hang or crash when a rank has died."""

LONGEST_SECONDS = 1e6
"""Longer times overflow in some versions of Python's watchdog."""

_started = False
"""Whether MPI was started here, with components that survive."""


def start_mpi() -> Any:
    """Starts MPI with components that survive; a second call changes nothing.

    Returns:
        The module `mpi4py.MPI`.

    Raises:
        ImportError: mpi4py is not installed, or finds no MPI library.
        LaunchError: the ranks were not started such that they can survive.
    """
    global _started
    _check_launcher()
    import mpi4py

    if not _started:
        # Not by the import, so that the library can be asked first. Nor is MPI finalised at the end then, which may wait for
        # ranks that have died.
        mpi4py.rc.initialize = False
    from mpi4py import MPI

    if not _started:
        _check_library(MPI)
        os.environ.update(components())
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        _started = True
        if MPI.COMM_WORLD.size == 1:
            atexit.register(MPI.Finalize)
    MPI.COMM_WORLD.Set_errhandler(MPI.ERRORS_RETURN)  # communicators that are made from it inherit this
    return MPI


def components() -> dict[str, str]:
    """The environment variables that choose Open MPI's components; what is set already is kept.

    Raises:
        LaunchError: a component that does not survive is asked for.
    """
    transport = os.environ.get(TRANSPORT) or "ob1"
    if transport != "ob1":
        raise LaunchError(
            f"survive needs the transport ob1, but {TRANSPORT}={transport} (or mpirun's --mca pml) asks for another one: leave "
            "that out"
        )
    collectives = os.environ.get(COLLECTIVES) or "^"
    if not collectives.startswith("^"):
        if asked := sorted(set(collectives.split(",")) & set(NOT_SURVIVING)):
            raise LaunchError(
                f"survive needs components that can lose a rank, but {COLLECTIVES}={collectives} (or mpirun's --mca coll) asks "
                f"for {', '.join(asked)}: leave that out"
            )
        return {TRANSPORT: transport, COLLECTIVES: collectives}
    excluded = dict.fromkeys([*filter(None, collectives[1:].split(",")), *NOT_SURVIVING])
    return {TRANSPORT: transport, COLLECTIVES: "^" + ",".join(excluded)}


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Ends this process with a traceback when the context takes longer than `seconds`.

    MPI starts when all ranks are there. It waits for one that was killed before, and Python's threads cannot run meanwhile.
    """
    if sys.__stderr__ is None:
        yield
        return
    faulthandler.dump_traceback_later(min(seconds, LONGEST_SECONDS), exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def end_without_mpi() -> None:
    """Lets this process end with the exit code of its program, but without the end of MPI, which may hang after a loss.

    To be called when the ranks have no more to tell each other. What MPI would remove is removed here, for dead ranks too.
    """
    remove_shared_memory()
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    libc.on_exit(
        libc._exit, None
    )  # _exit(code) is then the first that exit(code) does, which comes after all of Python's end


def remove_shared_memory() -> None:
    """Removes the files by which the ranks of this node have shared memory; those that still run keep the memory."""
    for file in _shared_memory():
        file.unlink(missing_ok=True)


def _shared_memory() -> set[Path]:
    """The files by which the ranks of this node share memory."""
    mapped = (line.split(maxsplit=5)[5:] for line in Path("/proc/self/maps").read_text().splitlines())
    return {Path(path[0]) for path in mapped if path and Path(path[0]).name.startswith("sm_segment.")}


def _check_launcher() -> None:
    if launched_by_torchrun():
        raise LaunchError(f"survive needs ranks of Open MPI, but torchrun has started this one: {START}")
    if launched_by_srun():
        raise LaunchError(
            f"survive needs Open MPI's own launcher, but srun has started this rank: in its place, {START}"
        )
    several = (launched_size() or 1) > 1
    if several and "OMPI_COMM_WORLD_SIZE" not in os.environ:
        raise LaunchError(
            f"survive needs Open MPI 5.0 or newer, but the launcher of another MPI has started this rank: {START}"
        )
    if several and os.environ.get(FAULT_TOLERANCE, "0").lower() in ("0", "false", "no"):
        raise LaunchError(f"survive needs an mpirun that does not end the job when a rank dies: {START}")


def _check_library(mpi: Any) -> None:
    vendor, version = mpi.get_vendor()
    if vendor != "Open MPI" or version[0] < 5:
        used = f"{vendor} {'.'.join(map(str, version))}"
        raise LaunchError(
            f"survive needs Open MPI 5.0 or newer, but mpi4py uses {used}: install mpi4py for such an Open MPI"
        )
    if not hasattr(mpi.Comm, "Shrink"):
        raise LaunchError("survive needs mpi4py 4.1 or newer, which can connect survivors: pip install 'mpi4py>=4.1'")
    if mpi.Is_initialized():
        raise LaunchError(
            "survive needs components of MPI that are chosen when it starts, but it has been started already: call "
            "hvdlocal.init(survive=True) before anything imports mpi4py.MPI"
        )
