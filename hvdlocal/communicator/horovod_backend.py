"""Horovod's allreduce, broadcast and allgather behind the communicator. The default backend."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from hvdlocal.communicator.base import Communicator
from hvdlocal.communicator.groups import Groups

DEFAULT_CYCLE_MILLISECONDS = "5"
"""Horovod's background thread wakes once a cycle, and between out-of-phase ranks it spins: at Horovod's own default of 1 ms
it can take a whole core. An averaging happens once in H steps and loses at most about one cycle."""


class HorovodCommunicator(Communicator):
    """All ranks of `mpirun`, `srun` or `horovodrun`, through Horovod. See `Communicator`.

    Args:
        timeout_seconds: see `Communicator`.
        divisible: whether `split` will be called. Horovod's process sets need its dynamic mode, in which the ranks exchange two
            numbers more in every cycle. HOROVOD_DYNAMIC_PROCESS_SETS=1 chooses it, too.

    Raises:
        ImportError: Horovod is not installed, or was built for another torch.
    """

    backend = "horovod"

    def __init__(self, timeout_seconds: float, *, divisible: bool = False) -> None:
        os.environ.setdefault("HOROVOD_CYCLE_TIME", DEFAULT_CYCLE_MILLISECONDS)
        import horovod.torch as hvd

        hvd.init(process_sets="dynamic" if divisible else None)
        self._hvd = hvd
        self._process_set = hvd.global_process_set
        self._process_sets = {tuple(range(hvd.size())): hvd.global_process_set}
        self._over_mpi = hvd.mpi_enabled()
        super().__init__(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), timeout_seconds)

    def shutdown(self) -> None:
        self._hvd.shutdown()

    @property
    def is_open(self) -> bool:
        """See `Communicator`. A script may have called Horovod's own `shutdown`."""
        return self._hvd.is_initialized()

    @property
    def can_be_replaced(self) -> bool:
        """See `Communicator`. Horovod's shutdown ends MPI, unless mpi4py had started it, and MPI starts once in a process."""
        mpi = sys.modules.get("mpi4py.MPI")
        return not self._over_mpi or (mpi is not None and not mpi.Is_finalized())

    def _says_that_a_peer_left(self, error: RuntimeError) -> bool:
        return "Horovod has been shut down" in str(error)

    def _join_group(self, groups: Groups, name: str) -> None:
        for group in groups:
            if len(group) > 1 and group not in self._process_sets:  # Horovod refuses a second set of the same ranks
                self._process_sets[group] = self._add_process_set(group)
        self._process_set = self._process_sets.get(self.job_ranks)

    def _add_process_set(self, group: tuple[int, ...]) -> Any:
        try:
            return self._hvd.add_process_set(group)
        except ValueError as error:
            raise ValueError(
                f"Horovod makes no group of the ranks {list(group)} ({error}): its process sets are fixed unless it was started "
                "by hvdlocal.init(island=…), or with HOROVOD_DYNAMIC_PROCESS_SETS=1 in the environment"
            ) from error

    def _start_sum(self, flat: torch.Tensor, name: str) -> _Handle:
        handle = self._hvd.allreduce_async_(flat, name=name, op=self._hvd.Sum, process_set=self._process_set)
        return _Handle(self._hvd, handle)

    def _start_broadcast(self, flat: torch.Tensor, name: str, root: int) -> _Handle:
        # The root is the job's number of a rank, also in a process set.
        handle = self._hvd.broadcast_async_(flat, self.job_ranks[root], name=name, process_set=self._process_set)
        return _Handle(self._hvd, handle)

    def _gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        payload = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        sizes = self._allgather(
            torch.tensor([payload.numel()], dtype=torch.int64, device="cpu"), f"{name}.size"
        ).tolist()
        together = self._allgather(payload, name)
        return [part.numpy().tobytes() for part in together.split(sizes)]

    def _allgather(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        handle = self._hvd.allgather_async(tensor, name=name, process_set=self._process_set)
        return self._wait(_Handle(self._hvd, handle), name)


class _Handle:
    def __init__(self, hvd: Any, handle: int) -> None:
        self._hvd = hvd
        self._handle = handle

    def done(self) -> bool:
        return self._hvd.poll(self._handle)

    def finish(self) -> Any:
        # Horovod's own synchronize() spins and is deaf to signals; after a successful poll it returns at once.
        return self._hvd.synchronize(self._handle)
