"""Joins the ranks of a job: chooses the backend, and checks that launcher and MPI library belong together."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal

from hvdlocal.communicator.base import Communicator
from hvdlocal.communicator.errors import LaunchError
from hvdlocal.communicator.horovod_backend import HorovodCommunicator
from hvdlocal.communicator.islands import Island, form_islands, parse_island
from hvdlocal.communicator.launched import launched_by_torchrun, launched_size
from hvdlocal.communicator.mpi4py_backend import Mpi4pyCommunicator
from hvdlocal.communicator.surviving_backend import SurvivingCommunicator
from hvdlocal.communicator.torch_backend import TorchCommunicator

BACKENDS = ("horovod", "mpi4py", "torch")
DEFAULT_TIMEOUT_SECONDS = 1800.0

_current: Communicator | None = None
_island: Island = 1
"""What the current communicator's islands were made from."""


def init(
    backend: Literal["horovod", "mpi4py", "torch"] | None = None,
    *,
    island: Literal["node"] | int | None = None,
    survive: bool | None = None,
    timeout_seconds: float | None = None,
) -> Communicator:
    """Joins the ranks of this job. Call it once, before building the optimizer; a second call returns the same object.

    After `shutdown()` it joins them again, which all ranks must do; but Horovod's shutdown ends MPI, and MPI starts only once in
    a process.

    Args:
        backend: "horovod", "mpi4py" or "torch" (torch.distributed); by default the environment variable HVDLOCAL_BACKEND, else
            Horovod.
        island: "node", or a number of ranks: so many ranks, between which communication is cheap, are one worker. They lie in
            one node, or are those of several whole nodes. By default the environment variable HVDLOCAL_ISLAND, else 1, which
            means no islands.
        survive: go on without ranks that die; needs the engine mpi4py and Open MPI's `mpirun --with-ft ulfm` (5.0 or newer). By
            default the environment variable HVDLOCAL_SURVIVE ("1" or "0"), else False, and a job ends with its first rank.
        timeout_seconds: how long one collective may take before it ends in an error; by default
            HVDLOCAL_TIMEOUT_SECONDS, else half an hour. With `survive`, ranks that have not come to it then are killed.

    Returns:
        The communicator: `.rank`, `.size`, `.local_rank` and so on; with islands also `.island` and `.peers`.

    Raises:
        ImportError: the backend is not installed; the message says how to get it.
        LaunchError: the launcher started several ranks that do not see each other, or not such that they can survive.
        MissingRanksError: with `survive`, a rank died while the ranks were joined.
        RuntimeError: MPI has ended in this process with an earlier communicator, or ranks have died.
        ValueError: unknown backend, or another one is in use already; the same for the island, and the ranks cannot be divided
            into such islands; `survive` with another engine than mpi4py.
    """
    global _current, _island
    if _current is not None and not _current.is_open:
        if not _current.can_be_replaced:
            if _current.survives:
                raise RuntimeError(
                    "hvdlocal.init() after shutdown(): ranks have died, and MPI cannot join those that are left again"
                )
            raise RuntimeError(
                "hvdlocal.init() after shutdown(): with Horovod's shutdown MPI has ended, which a process can start only once. "
                "Call shutdown() at the end of the program; where it must be called before, import mpi4py.MPI first of all, "
                "which then keeps MPI, or use HVDLOCAL_BACKEND=mpi4py."
            )
        _current = None
    if _current is not None:
        if backend not in (None, _current.backend):
            raise ValueError(f"hvdlocal.init({backend!r}): this process already uses {_current.backend!r}")
        if island not in (None, _island, _current.island_size):
            raise ValueError(f"hvdlocal.init(island={island!r}): this process already uses island={_island!r}")
        if survive not in (None, _current.survives):
            raise ValueError(f"hvdlocal.init(survive={survive}): this process already uses survive={_current.survives}")
        return _current
    chosen = backend or os.environ.get("HVDLOCAL_BACKEND") or "horovod"
    if timeout_seconds is None:
        timeout_seconds = _timeout_from_environment()
    if island is None:
        chosen_island = parse_island(os.environ.get("HVDLOCAL_ISLAND") or 1, "HVDLOCAL_ISLAND")
    else:
        chosen_island = parse_island(island, "island")
    if survive is None:
        survive = _survive_from_environment()
    if survive and chosen != "mpi4py":
        raise ValueError(f"survive needs the engine mpi4py, but {chosen} is chosen: set HVDLOCAL_BACKEND=mpi4py")
    if chosen == "horovod":
        communicator = _horovod(timeout_seconds, divisible=chosen_island != 1)
    elif chosen == "mpi4py":
        communicator = _mpi4py(timeout_seconds, survive=survive)
    elif chosen == "torch":
        communicator = TorchCommunicator(timeout_seconds)
    else:
        raise ValueError(f"unknown backend {chosen!r}: choose one of {', '.join(BACKENDS)}")
    _check_world(communicator.size, chosen)
    form_islands(communicator, chosen_island)
    _current, _island = communicator, chosen_island
    return communicator


def current() -> Communicator:
    """The communicator that `init` made.

    Raises:
        RuntimeError: `init` has not been called, or not again after a shutdown.
    """
    if _current is None or not _current.is_open:
        raise RuntimeError("hvdlocal is not initialised: call hvdlocal.init() first, once, on every rank")
    return _current


def _horovod(timeout_seconds: float, *, divisible: bool) -> Communicator:
    try:
        return HorovodCommunicator(timeout_seconds, divisible=divisible)
    except ImportError as error:
        others = "torch.distributed: HVDLOCAL_BACKEND=torch"
        if find_spec("mpi4py"):
            others = f"plain MPI: HVDLOCAL_BACKEND=mpi4py, or {others}"
        raise ImportError(
            f"Horovod cannot be used here ({type(error).__name__}: {error}). Build it for this torch and MPI with `make setup` "
            f"(see docs/install.md), or use {others}."
        ) from error


def _mpi4py(timeout_seconds: float, *, survive: bool) -> Communicator:
    try:
        return SurvivingCommunicator(timeout_seconds) if survive else Mpi4pyCommunicator(timeout_seconds)
    except ImportError as error:
        raise ImportError(
            f"mpi4py cannot be used here ({error}). `pip install mpi4py`, and have the MPI library that started this job on "
            "LD_LIBRARY_PATH; or use torch.distributed: HVDLOCAL_BACKEND=torch."
        ) from error


def _survive_from_environment() -> bool:
    text = os.environ.get("HVDLOCAL_SURVIVE") or "0"
    if text not in ("0", "1"):
        raise ValueError(f"HVDLOCAL_SURVIVE={text!r}: set it to 1 or 0")
    return text == "1"


def _timeout_from_environment() -> float:
    text = os.environ.get("HVDLOCAL_TIMEOUT_SECONDS", str(DEFAULT_TIMEOUT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"HVDLOCAL_TIMEOUT_SECONDS={text!r}: give a positive number of seconds")
    return seconds


def _check_world(size: int, backend: str) -> None:
    """Refuses the classic silent mistake: K processes that each believe to be alone, because mpirun is another MPI's."""
    told = launched_size()
    if told in (None, size):
        return
    if launched_by_torchrun():
        raise LaunchError(
            f"torchrun's variables tell of {told} ranks (WORLD_SIZE), but {backend} sees {size}: torchrun starts ranks for "
            "HVDLOCAL_BACKEND=torch alone; unset RANK and WORLD_SIZE if they are left over from elsewhere"
        )
    raise LaunchError(
        f"the launcher started {told} ranks, but {backend} sees {size}: mpirun or srun belongs to another MPI than the one "
        f"that {backend} was built with. Use the mpirun of that MPI (`hvdlocal doctor` names it), or rebuild."
    )
