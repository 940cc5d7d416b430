"""Ranks as the launcher numbers them in the environment, known before any message is sent."""

from __future__ import annotations

import os
from typing import NamedTuple


class _Variables(NamedTuple):
    """The variables of one launcher; empty where it has none."""

    rank: str
    size: str
    local_rank: str = ""
    local_size: str = ""


_TORCHRUN = _Variables("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SRUN = _Variables("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_LAUNCHERS = (
    _Variables(
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
    ),
    _Variables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI, Cray
    _Variables("PMIX_RANK", ""),
    _Variables("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    # Slurm's come last: below an mpirun that srun started they count mpirun's daemons.
    _SRUN,
)


def launched_size() -> int | None:
    """The number of ranks that the launcher started; None without a launcher that is known."""
    return _first("size", _launchers())


def launched_rank() -> int | None:
    """The launcher's number for this process; None as for `launched_size`."""
    return _first("rank", _launchers())


def launched_local() -> tuple[int, int] | None:
    """The launcher's number for this process on its node, and its number of processes there; None if it tells not both."""
    rank, size = _first("local_rank", _launchers()), _first("local_size", _launchers())
    return None if rank is None or size is None else (rank, size)


def launched_by_srun() -> bool:
    """Whether `launched_size` is that of a step of Slurm."""
    return _number(_SRUN.size) is not None and all(
        _number(one.size) is None for one in _launchers() if one is not _SRUN
    )


def launched_by_torchrun() -> bool:
    """Whether the numbers are those of torchrun, or of a script that sets its variables."""
    rank, size = _number(_TORCHRUN.rank), _number(_TORCHRUN.size)
    if (
        rank is None or size is None
    ):  # WORLD_SIZE alone is often exported for a job of which the ranks are started otherwise
        return False
    others = _first("size", _LAUNCHERS) or 1
    # The variables may be left over from elsewhere. Below mpirun or srun only torchrun itself counts, which each of their ranks
    # has started, with at least one rank of its own.
    return others == 1 or ("TORCHELASTIC_RUN_ID" in os.environ and size >= others)


def _first(field: str, launchers: tuple[_Variables, ...]) -> int | None:
    numbers = (_number(getattr(launcher, field)) for launcher in launchers)
    return next((number for number in numbers if number is not None), None)


def _launchers() -> tuple[_Variables, ...]:
    return (_TORCHRUN,) if launched_by_torchrun() else _LAUNCHERS


def _number(variable: str) -> int | None:
    told = os.environ.get(variable, "") if variable else ""
    return int(told) if told.isascii() and told.isdigit() else None
