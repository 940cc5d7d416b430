"""The cost of one averaging: hvdlocal compared with a bare allreduce of the same bytes, and with other libraries.

mpirun -np 2 --bind-to none python benchmarks/averaging.py [--models resnet18_cifar resnet50 vit_b_16] [--json FILE]

All candidates alternate in the same processes, with a barrier before each and the slowest rank's time counting, so that
ratios within a trial are meaningful on a noisy machine. No network is involved: ranks on one node average through shared
memory, where the work in addition to the collective is most visible.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HOROVOD_CYCLE_TIME", "5")

import torch
import torch.distributed as dist
from harness import machine
from mpi4py import MPI
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel

import hvdlocal
from hvdlocal.averaging.flat_buffer import FlatViews
from hvdlocal.communicator.mpi4py_backend import Mpi4pyCommunicator
from hvdlocal.models import build_model

SHAPES = {"resnet18_cifar": (32, 32, 3), "resnet50": (224, 224, 3), "vit_b_16": (224, 224, 3)}
NEVER = 10**9


class Weights(torch.nn.Module):
    """The parameters and buffers of a network without its layers; all networks of one size share their gradients."""

    def __init__(self, like: torch.nn.Module, with_buffers: bool = False) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(p.detach().clone()) for p in like.parameters()])
        for i, buffer in enumerate(like.buffers() if with_buffers else []):
            self.register_buffer(f"buffer{i}", buffer.clone())

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Returns a loss whose gradient is `gradients`, so that the backward pass costs almost nothing."""
        return torch.stack([(p * g).sum() for p, g in zip(self.weights, gradients, strict=True)]).sum()


@dataclass
class Candidate:
    """Work that is timed: `run`, after `prepare`, which is not timed."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    seconds: list[float] = field(default_factory=list)


def averagings(
    model: torch.nn.Module, gradients: list[torch.Tensor], mpi: Mpi4pyCommunicator, peers: bool
) -> Iterator[Candidate]:
    """Yields ways to average a model once."""
    import horovod.torch as hvd

    horovod = hvdlocal.init("horovod")
    numel = sum(p.numel() for p in model.parameters())
    flat = torch.zeros(numel)
    array = flat.numpy()

    def touch() -> None:
        flat.mul_(1)  # as a step does with the parameters just before they are averaged

    yield Candidate("floor: hvd.allreduce_ (Average)", lambda: hvd.allreduce_(flat, name="floor.average"), touch)
    yield Candidate("floor: hvd.allreduce_ (Sum)", lambda: hvd.allreduce_(flat, name="floor.sum", op=hvd.Sum), touch)
    yield Candidate("floor: MPI_Allreduce (sum)", lambda: mpi_world().Allreduce(MPI.IN_PLACE, array), touch)

    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "with sketch": {"scaling": hvdlocal.LocalAdaScale()},
        "with exact statistics": {"scaling": hvdlocal.LocalAdaScale(statistics="exact")},
        "with moments": {"momentum": "average"},
    }
    if any(True for _ in model.buffers()):
        variants["with BN buffers"] = {"buffers": {"buffer*": "average"}}
    for name, settings in variants.items():
        ours = Weights(model, with_buffers="buffers" in settings)
        for p, g in zip(ours.weights, gradients, strict=True):
            p.grad = g
        inner = torch.optim.SGD(ours.parameters(), lr=0.0, momentum=0.9 if "momentum" in settings else 0.0)
        optimizer = hvdlocal.LocalOptimizer(inner, ours, period=hvdlocal.ConstantPeriod(NEVER), **settings)
        for backend, communicator in (("horovod", horovod), ("mpi4py", mpi)):
            yield Candidate(f"hvdlocal {name}, {backend}", *_round(optimizer, communicator))

    if not peers:
        return
    peer = Weights(model)
    for p, g in zip(peer.weights, gradients, strict=True):
        p.grad = g  # torch's averager leaves out parameters without one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises against averaging at every step, which is what is timed
        averager = PeriodicModelAverager(period=1)
    tensors = [p.data for p in peer.weights]

    def touch_all() -> None:
        torch._foreach_mul_(tensors, 1)

    yield Candidate("torch model averaging, Gloo", lambda: averager.average_parameters(list(peer.weights)), touch_all)

    def one_by_one() -> None:
        for i, tensor in enumerate(tensors):
            hvd.allreduce_(tensor, name=f"one.{i}")

    def all_at_once() -> None:
        for handle in [hvd.allreduce_async_(tensor, name=f"many.{i}") for i, tensor in enumerate(tensors)]:
            hvd.synchronize(handle)

    yield Candidate("Horovod, parameter after parameter", one_by_one, touch_all)
    yield Candidate("Horovod, all parameters in flight", all_at_once, touch_all)
    yield Candidate("Horovod, grouped allreduce", lambda: hvd.grouped_allreduce_(tensors, name="grouped"), touch_all)


def _round(optimizer: hvdlocal.LocalOptimizer, communicator: Any) -> tuple[Callable[[], object], Callable[[], object]]:
    def prepare() -> None:
        optimizer.communicator = optimizer._round_average.communicator = communicator
        optimizer.step()  # the first step of a round that would not end

    def run() -> None:
        if optimizer._statistics is not None:
            optimizer._write_statistics(optimizer._statistics)  # the first step of a round does this: part of the cost
        optimizer.synchronize()

    return run, prepare


def steps(model: torch.nn.Module, gradients: list[torch.Tensor], mpi: Mpi4pyCommunicator) -> Iterator[Candidate]:
    """Yields ways to take one data-parallel step: backward pass, exchange, update."""
    import horovod.torch as hvd

    def step(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
        def run() -> None:
            optimizer.zero_grad()
            network(gradients).backward()
            optimizer.step()

        return run

    def sgd(network: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(network.parameters(), lr=0.0)

    plain = Weights(model)
    yield Candidate("no exchange", step(plain, sgd(plain)))
    network = Weights(model)
    named = [(f"ddp.{key}", p) for key, p in network.named_parameters()]
    yield Candidate(
        "hvd.DistributedOptimizer", step(network, hvd.DistributedOptimizer(sgd(network), named_parameters=named))
    )
    parallel = DistributedDataParallel(Weights(model))
    yield Candidate("PyTorch DDP, Gloo", step(parallel, sgd(parallel)))
    horovod = hvdlocal.init("horovod")
    variants: dict[str, dict[str, Any]] = {
        "horovod": {"communicator": horovod},
        "horovod, one sum": {"communicator": horovod, "bucket_bytes": None},
        "mpi4py": {"communicator": mpi},
    }
    for name, settings in variants.items():
        network = Weights(model)
        optimizer = hvdlocal.SynchronousOptimizer(sgd(network), network, **settings)
        yield Candidate(f"hvdlocal sync, {name}", step(network, optimizer))


def mpi_world() -> MPI.Comm:
    return MPI.COMM_WORLD


def run_trials(candidates: list[Candidate], trials: int) -> None:
    """Runs every candidate once per trial, in an order that changes; the first trial is not counted."""
    world = MPI.COMM_WORLD
    for trial in range(trials + 1):
        for place in torch.randperm(len(candidates), generator=torch.Generator().manual_seed(trial)).tolist():
            candidate = candidates[place]
            candidate.prepare()
            world.Barrier()
            start = time.perf_counter()
            candidate.run()
            slowest = world.allreduce(time.perf_counter() - start, op=MPI.MAX)
            if trial:
                candidate.seconds.append(slowest)


def table(title: str, candidates: list[Candidate], floors: list[Candidate]) -> list[str]:
    """Returns, as lines of text, median milliseconds and the median of the ratios to each floor within a trial."""
    heads = [f"/ {floor.name.partition(': ')[2] or floor.name}" for floor in floors]
    lines = [title, f"{'':40}{'ms':>9}  {'min … max':>15}" + "".join(f"{head:>32}" for head in heads)]
    for one in candidates:
        ratios = [ratio(one, floor) for floor in floors]
        spread = f"{1000 * min(one.seconds):.0f} … {1000 * max(one.seconds):.0f}"
        lines.append(
            f"{one.name:40}{1000 * statistics.median(one.seconds):9.1f}  {spread:>15}"
            + "".join(f"{value:32.2f}" for value in ratios)
        )
    return lines


def ratio(one: Candidate, other: Candidate) -> float:
    return statistics.median(a / b for a, b in zip(one.seconds, other.seconds, strict=True))


@contextmanager
def gloo() -> Iterator[None]:
    """Opens PyTorch's own process group over the same ranks."""
    world = MPI.COMM_WORLD
    with tempfile.TemporaryDirectory() as folder:
        path = world.bcast(f"{folder}/store")
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=world.rank, world_size=world.size)
        try:
            yield
        finally:
            world.Barrier()
            dist.destroy_process_group()


def measure(name: str, trials: int, mpi: Mpi4pyCommunicator, peers: bool, kinds: list[str]) -> dict[str, Any]:
    """Makes the comparisons of these kinds for one model; prints and returns the results."""
    torch.manual_seed(0)
    model = build_model(name, 1000, SHAPES[name])
    numel = sum(p.numel() for p in model.parameters())
    gradients = FlatViews(list(model.parameters())).of(torch.randn(FlatViews(list(model.parameters())).numel))
    results: dict[str, Any] = {"parameters": numel}
    for kind in kinds:
        candidates = list(
            averagings(model, gradients, mpi, peers) if kind == "averaging" else steps(model, gradients, mpi)
        )
        run_trials(candidates, trials)
        floors = candidates[:3]
        if mpi.rank == 0:
            print(
                "\n".join(table(f"\n{name} ({numel / 1e6:.1f} M parameters): one {kind}", candidates, floors)),
                flush=True,
            )
        results[kind] = {
            one.name: {"seconds": one.seconds, "ratios": {floor.name: ratio(one, floor) for floor in floors}}
            for one in candidates
        }
        candidates.clear()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--trials", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="of torch, per rank (default: %(default)s)")
    parser.add_argument("--without-peers", action="store_true", help="hvdlocal and the bare allreduces only")
    parser.add_argument("--kinds", nargs="+", default=["averaging", "step"], choices=["averaging", "step"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    communicator = hvdlocal.init("horovod")
    mpi = Mpi4pyCommunicator(600)
    facts = machine() | {
        "ranks": communicator.size,
        "threads": arguments.threads,
        "horovod cycle, ms": os.environ["HOROVOD_CYCLE_TIME"],
        "cores usable by a rank": len(os.sched_getaffinity(0)),
        "MPI": MPI.Get_library_version().split(",")[0].strip(),
    }
    if mpi.rank == 0:
        print(", ".join(f"{key}: {value}" for key, value in facts.items() if key != "versions"))
    peers = not arguments.without_peers
    with gloo() if peers else nullcontext():
        kinds = arguments.kinds if peers else ["averaging"]
        results = {name: measure(name, arguments.trials, mpi, peers, kinds) for name in arguments.models}
    if mpi.rank == 0 and arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": facts, "results": results}, indent=2) + "\n")
        print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
