"""Where the ranks of a job meet before they are connected: a key-value store that rank 0 serves."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from hvdlocal.communicator.errors import LaunchError
from hvdlocal.communicator.launched import launched_by_srun, launched_by_torchrun

DEFAULT_PORT = 29500
"""That of torchrun."""

FOREVER = timedelta(days=365)
"""The deadlines are the communicator's own, whose messages name rank and collective."""

REMEDY = "set MASTER_ADDR to the host of rank 0 (and MASTER_PORT to a free port of it) on all ranks"


@dataclass(frozen=True)
class MeetingPoint:
    """The address of a job's store.

    Attributes:
        source: where the address is from, as a message should show it.
    """

    host: str
    port: int
    source: str


def find_meeting_point(size: int) -> MeetingPoint:
    """Returns where this job's ranks meet; a collective of MPI where the environment does not tell.

    Args:
        size: number of ranks that the launcher started.

    Raises:
        LaunchError: neither the environment nor MPI tells.
    """
    if host := os.environ.get("MASTER_ADDR"):
        port = os.environ.get("MASTER_PORT") or str(DEFAULT_PORT)
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise LaunchError(f"MASTER_PORT={port!r}: give the number of a free port on MASTER_ADDR={host}")
        return MeetingPoint(host, int(port), f"MASTER_ADDR={host}, MASTER_PORT={port}")
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if nodes and launched_by_srun():
        return MeetingPoint(first_node(nodes), _port_of_step(), f"the first node of Slurm's step ({nodes})")
    return _over_mpi(size)


def open_store(point: MeetingPoint, rank: int, timeout_seconds: float) -> dist.Store:
    """Serves the store on rank 0 and connects the others; blocks until rank 0 is there.

    Raises:
        LaunchError: the address cannot be used, or rank 0 was not there within `timeout_seconds`.
    """
    torchrun_serves = launched_by_torchrun() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not torchrun_serves
    try:
        socket.getaddrinfo(point.host, point.port)
        return dist.TCPStore(
            point.host,
            point.port,
            is_master=serves,
            timeout=timedelta(seconds=min(timeout_seconds, FOREVER.total_seconds())),
            wait_for_workers=False,
            multi_tenant=True,  # a script's own init_process_group may serve the same address
        )
    except (OSError, RuntimeError) as error:
        raise LaunchError(
            f"rank {rank} cannot {'serve' if serves else 'reach'} port {point.port} of {point.host} (from {point.source}), where "
            f"the ranks meet ({str(error).splitlines()[0]}): {REMEDY}"
        ) from error


def first_node(nodes: str) -> str:
    """The first name of a list as Slurm writes it: 'node01' of 'node[01-04,09],login1'."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _port_of_step() -> int:
    """A port below those that systems give out, another one for every step of Slurm that may share a node."""
    job, step = (int(os.environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 15000 + (job * 16 + step) % 15000


def _over_mpi(size: int) -> MeetingPoint:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise LaunchError(
            f"the {size} ranks do not find each other: the launcher does not tell where rank 0 runs, and mpi4py, which could ask "
            f"it, cannot be used ({error}): {REMEDY}, start them with torchrun, or install mpi4py"
        ) from error
    world = MPI.COMM_WORLD
    if world.size != size:
        raise LaunchError(
            f"the launcher started {size} ranks, but mpi4py sees {world.size}: mpirun or srun belongs to another MPI than the "
            f"one that mpi4py was built with; use the mpirun of that MPI (`hvdlocal doctor` names it), or {REMEDY}"
        )
    hosts = world.allgather(socket.gethostname())
    host = "localhost" if len(set(hosts)) == 1 else hosts[0]
    return MeetingPoint(host, world.bcast(_free_port()), "MPI")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
