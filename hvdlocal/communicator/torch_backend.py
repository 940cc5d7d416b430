"""torch.distributed behind the communicator: Gloo for tensors on the CPU, NCCL (RCCL) for those on GPUs. Needs no Horovod."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from hvdlocal.communicator.base import Pending
from hvdlocal.communicator.errors import LaunchError
from hvdlocal.communicator.groups import Groups
from hvdlocal.communicator.islands import node_name
from hvdlocal.communicator.launched import launched_local, launched_rank, launched_size
from hvdlocal.communicator.rendezvous import FOREVER, find_meeting_point, open_store
from hvdlocal.communicator.threaded import Call, ThreadedCommunicator, through_host_memory

_joins = count()
"""Numbers the communicators of this process, which may meet at one address."""


class TorchCommunicator(ThreadedCommunicator):
    """All ranks of `mpirun`, `srun` or `torchrun`, through process groups of torch.distributed. See `Communicator`.

    The process groups are its own: a script may use `torch.distributed.init_process_group` beside it. CUDA tensors are summed by
    NCCL, unless ranks share a GPU, which NCCL refuses: then they are staged through host memory.

    Raises:
        LaunchError: the ranks do not find each other, or the launcher's numbers contradict each other.
    """

    backend = "torch"

    def __init__(self, timeout_seconds: float) -> None:
        if launched_size() is None and (given := os.environ.get("RANK")):
            raise LaunchError(
                f"RANK={given!r}, WORLD_SIZE={os.environ.get('WORLD_SIZE', '')!r}: give both as numbers, or start the ranks with "
                "mpirun, srun or torchrun, which do"
            )
        rank, size = launched_rank() or 0, launched_size() or 1
        if rank >= size:
            raise LaunchError(
                f"the launcher numbers this process {rank} of {size} ranks: start them with mpirun, srun or torchrun"
            )
        local_rank, local_size = launched_local() or (0, 1)
        super().__init__(rank, size, local_rank, local_size, timeout_seconds)
        # On GPUs, NCCL's kernels of several groups may wait for each other unless all ranks begin them in one order.
        self._allows_several_threads = not torch.cuda.is_available()
        self._groups: dict[tuple[int, ...], Any] = {}
        self._gpu_groups: dict[tuple[int, ...], Any] = {}
        if size == 1:
            return
        point = find_meeting_point(size)
        meeting = self._submit(lambda: open_store(point, rank, timeout_seconds))
        store = self._wait(meeting, f"hvdlocal.meet at port {point.port} of {point.host}")
        place = f"hvdlocal/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_joins)}"
        self._store = dist.PrefixStore(place, store)
        self._wait(self._submit(self._connect), "hvdlocal.connect")
        if launched_local() is None:
            nodes = self.gather(node_name(), "hvdlocal.nodes")
            self.local_rank, self.local_size = nodes[:rank].count(nodes[rank]), nodes.count(nodes[rank])

    def _connect(self) -> None:
        """Connects the ranks of this communicator with each other; blocks."""
        try:
            group = dist.ProcessGroupGloo(self._own_store("gloo"), self.rank, self.size, FOREVER)
        except RuntimeError as error:
            raise LaunchError(
                f"{self.describe()}: Gloo does not connect the ranks {list(self.job_ranks)} ({error}): look for a rank that "
                f"ended, and name the network interface with GLOO_SOCKET_IFNAME (now {os.environ.get('GLOO_SOCKET_IFNAME')!r})"
            ) from error
        self._groups[self.job_ranks] = group

    def _own_store(self, kind: str) -> dist.Store:
        return dist.PrefixStore(f"{kind}/{','.join(map(str, self.job_ranks))}", self._store)

    def _announce_departure(self) -> None:
        def disconnect() -> None:  # the other ranks see closed connections
            self._groups.clear()
            self._gpu_groups.clear()

        self._submit(disconnect)

    def _says_that_a_peer_left(self, error: RuntimeError) -> bool:
        return any(
            words in str(error) for words in ("onnection closed by peer", "onnection reset by peer", "Broken pipe")
        )

    def _connect_group(self, groups: Groups, name: str) -> None:
        if self.size > 1 and self.job_ranks not in self._groups:
            self._wait(self._submit(self._connect), name)

    def _start_sum(self, flat: torch.Tensor, name: str) -> Call:
        def collective(group: Any, tensor: torch.Tensor) -> dist.Work:
            return group.allreduce([tensor], dist.AllreduceOptions())

        return self._start(flat, f"sum of {flat.numel()} {flat.dtype} ({name})", collective)

    def _start_broadcast(self, flat: torch.Tensor, name: str, root: int) -> Call:
        def collective(group: Any, tensor: torch.Tensor) -> dist.Work:
            options = dist.BroadcastOptions()
            options.rootRank = root
            return group.broadcast([tensor], options)

        what = f"broadcast of {flat.numel()} {flat.dtype} from rank {self.job_ranks[root]} ({name})"
        return self._start(flat, what, collective)

    def _start_sharing(self, flat: torch.Tensor, name: str) -> list[tuple[Pending, str]]:
        def collective(group: Any, tensor: torch.Tensor) -> dist.Work:
            mine = tensor.split(tensor.numel() // self.size)[self.rank]
            return group._allgather_base(tensor, mine)

        return [(self._start(flat, f"slices of {flat.numel()} {flat.dtype} ({name})", collective), name)]

    def _start(self, flat: torch.Tensor, what: str, collective: Callable[[Any, torch.Tensor], dist.Work]) -> Call:
        def on_cpu(host: torch.Tensor) -> None:
            collective(self._groups[self.job_ranks], host).wait()

        if not flat.is_cuda:
            return self._in_host_memory(flat, what, on_cpu)
        computed = torch.cuda.current_stream(flat.device).record_event()

        def work() -> None:
            self._agree_on(what)
            group = self._gpu_group(flat.device)
            # A stream that waits for the tensor, and not for the kernels that the caller has begun since.
            stream = torch.cuda.Stream(flat.device)
            stream.wait_event(computed)
            with torch.cuda.stream(stream):
                if group is None:
                    through_host_memory(flat, on_cpu)
                    stream.synchronize()
                    return
                pending = collective(group, flat)
            while not pending.is_completed():
                time.sleep(1e-4)
            pending.wait()  # raises what went wrong

        return self._submit(work)

    def _gpu_group(self, device: torch.device) -> Any:
        """NCCL's group of these ranks, made when a first CUDA tensor is there; None if ranks share a GPU. Blocks."""
        if self.job_ranks not in self._gpu_groups:
            mine = f"{node_name()} {torch.cuda.get_device_properties(device).uuid}"
            gpus = [one.decode() for one in self._exchange(mine.encode())]
            shared = len(set(gpus)) < len(gpus)
            self._gpu_groups[self.job_ranks] = None if shared else self._nccl(device)
            if shared and self.rank == 0:
                warnings.warn(
                    "several ranks use one GPU, which NCCL refuses: CUDA tensors go through host memory", stacklevel=1
                )
        return self._gpu_groups[self.job_ranks]

    def _nccl(self, device: torch.device) -> Any:
        with torch.cuda.device(device):
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = FOREVER
            return dist.ProcessGroupNCCL(self._own_store("nccl"), self.rank, self.size, options)

    def _maximum_(self, numbers: NDArray[np.int64]) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        self._groups[self.job_ranks].allreduce([torch.from_numpy(numbers)], options).wait()

    def _exchange(self, data: bytes) -> list[bytes]:
        sizes = [int(size) for size in self._all_gather(torch.tensor([len(data)], dtype=torch.int64, device="cpu"))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return [one[:size].numpy().tobytes() for one, size in zip(self._all_gather(padded), sizes, strict=True)]

    def _all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        everyone = [torch.empty_like(tensor) for _ in range(self.size)]
        self._groups[self.job_ranks].allgather([everyone], [tensor]).wait()
        return everyone
