"""Rank and number of ranks as the launcher sets them in the environment, known before MPI starts."""

from __future__ import annotations

import os

_LAUNCHER_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""The variables in which Open MPI, MPICH/Intel MPI/Cray, MVAPICH and srun give the number of ranks. Slurm's comes last: below
an mpirun that srun started it counts mpirun's daemons."""

_LAUNCHER_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")


def launched_size() -> int | None:
    """The number of ranks that the launcher started; None without a launcher that is known."""
    return next((int(told) for name in _LAUNCHER_SIZES if (told := os.environ.get(name, "")).isdigit()), None)


def launched_rank() -> int | None:
    """The launcher's number for this process; None as for `launched_size`."""
    return next((int(told) for name in _LAUNCHER_RANKS if (told := os.environ.get(name, "")).isdigit()), None)
