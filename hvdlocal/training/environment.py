"""Where a run takes place: device, threads, versions, and how it was started."""

from __future__ import annotations

import functools
import os
import platform
import socket
import sys
from importlib import metadata
from typing import Any

import torch

from hvdlocal.communicator import Communicator
from hvdlocal.version import __version__

_LAUNCH_VARIABLES = (
    "HOROVOD_",
    "HVDLOCAL_",
    "OMP_",
    "MKL_",
    "SLURM_",
    "OMPI_COMM_WORLD_",
    "PMI_",
    "NCCL_",
    "CUDA_VISIBLE",
)
_SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def choose_device(name: str, communicator: Communicator) -> torch.device:
    """Returns this rank's device: one GPU per local rank, or the CPU.

    Raises:
        ValueError: CUDA is asked for and absent, or a node has more ranks than GPUs.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "device=cuda, but this torch finds no CUDA device: use device=cpu, or a CUDA build of torch on a GPU node"
        )
    devices = torch.cuda.device_count()
    if devices > 1 and communicator.local_size > devices:
        raise ValueError(
            f"{communicator.local_size} ranks on {socket.gethostname()} for {devices} GPUs: start as many ranks as there are GPUs"
        )
    # A launcher that binds GPUs shows each rank its own one as number 0.
    device = torch.device("cuda", communicator.local_rank % devices)
    torch.cuda.set_device(device)
    return device


def set_threads(threads: int | None, communicator: Communicator) -> int:
    """Sets torch's CPU threads, so that ranks do not compete for cores; a collective.

    Args:
        threads: of this rank; None for OMP_NUM_THREADS or, without that, the usable cores divided by the ranks that share them.
        communicator: the ranks, some of which may share cores.

    Returns:
        The number of threads.
    """
    mine = (socket.gethostname(), sorted(os.sched_getaffinity(0)))
    everyone = communicator.gather(mine, "hvdlocal.cores")
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(mine[1]) // sharing(mine, everyone))
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def sharing(mine: tuple[str, list[int]], everyone: list[tuple[str, list[int]]]) -> int:
    """Counts the ranks (host, usable cores) that use some of this rank's cores, itself included."""
    return sum(host == mine[0] and not set(cores).isdisjoint(mine[1]) for host, cores in everyone)


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions on which numbers depend. They are read once, since an installation may change during a long run."""
    found = {"hvdlocal": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("horovod", "mpi4py", "torchvision", "numpy", "h5py"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_run(communicator: Communicator, device: torch.device, threads: int) -> dict[str, Any]:
    """Returns how and where this job was started; a collective."""
    hosts = communicator.gather(socket.gethostname(), "hvdlocal.hosts")
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_LAUNCH_VARIABLES) and not any(word in name for word in _SECRET_WORDS)
    }
    return {
        "command": sys.argv,
        "versions": versions(),
        "backend": communicator.backend,
        "ranks": communicator.size,
        "island_size": communicator.island_size,
        "hosts": hosts,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "environment": variables,
    }
