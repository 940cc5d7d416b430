"""What a launcher tells the processes that it starts, before MPI is there."""

from __future__ import annotations

import os

_LAUNCHER_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""How Open MPI, MPICH/Intel MPI/Cray, MVAPICH and srun tell a process how many ranks were started. Slurm's comes last: below
an mpirun that srun started it counts mpirun's daemons."""

_LAUNCHER_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")


def launched_size() -> int | None:
    """How many ranks the launcher says it started; None when no launcher that is known did."""
    return next((int(told) for name in _LAUNCHER_SIZES if (told := os.environ.get(name, "")).isdigit()), None)


def launched_rank() -> int | None:
    """What the launcher calls this process; None as for `launched_size`."""
    return next((int(told) for name in _LAUNCHER_RANKS if (told := os.environ.get(name, "")).isdigit()), None)
