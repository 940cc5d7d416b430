"""Training over a slow link: seconds per step of each method, compared with the prediction of Eq. 16 of Balles et al. from m.

benchmarks/slow_link.sh 1gbit          (runs this on two ranks that are joined by such a link)

m is the time of a bare allreduce of a method's payload over the time of a step of plain SGD. Both are measured separately from
the methods, so that 1 + m/H is a prediction, without overlap of sums and backward pass. The methods train the same network (three
linear layers, 2.6 M parameters: little to compute, much to send) on the same random images, in alternating trials.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HOROVOD_CYCLE_TIME", "1")

import torch
from harness import machine
from torch import nn
from torch.nn import functional as F

import hvdlocal

BATCH = 64
PEAK = 0.02


class Run:
    """A method with its own replica.

    Args:
        name: label in the table.
        wrap: makes the optimizer from (inner optimizer, model).
        steps: length of a trial; the learning rate falls from its peak along a cosine in every trial.
    """

    def __init__(self, name: str, wrap: Callable[..., torch.optim.Optimizer], steps: int) -> None:
        torch.manual_seed(0)
        self.name = name
        self.steps = steps
        layers = [nn.Flatten(), nn.Linear(3072, 768), nn.ReLU(), nn.Linear(768, 256), nn.ReLU(), nn.Linear(256, 10)]
        self.model = nn.Sequential(*layers)
        self.optimizer = wrap(torch.optim.SGD(self.model.parameters(), lr=PEAK, momentum=0.9), self.model)
        self.seconds: list[float] = []
        self.averagings = self.floats = 0

    def trial(self, x: torch.Tensor, y: torch.Tensor, count: bool) -> None:
        optimizer = self.optimizer
        communicator = hvdlocal.init()
        communicator.barrier("bench.start")
        collectives, sent = communicator.traffic.collectives, communicator.traffic.bytes
        start = time.perf_counter()
        for step in range(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = PEAK * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))
            optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            optimizer.step()
        if isinstance(optimizer, hvdlocal.LocalOptimizer):
            optimizer.synchronize()
        if count:
            self.seconds.append((time.perf_counter() - start) / self.steps)
            self.averagings += communicator.traffic.collectives - collectives
            self.floats += (communicator.traffic.bytes - sent) // 4

    @property
    def per_step(self) -> float:
        return statistics.median(self.seconds)

    @property
    def period(self) -> float:
        """Steps per collective."""
        return self.steps * len(self.seconds) / self.averagings

    @property
    def payload(self) -> int:
        """Floats per collective."""
        return self.floats // self.averagings


def local(period: hvdlocal.averaging.period.PeriodRule, **settings: object) -> Callable[..., torch.optim.Optimizer]:
    return lambda inner, model: hvdlocal.LocalOptimizer(inner, model, period=period, **settings)


def methods(steps: int) -> list[Run]:
    """Returns the candidates: plain SGD, which shows the cost of a step alone, then data parallelism, then local methods."""
    ada, constant = hvdlocal.LocalAdaScale, hvdlocal.ConstantPeriod
    wraps: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "plain SGD": lambda inner, model: inner,
        "sync, without overlap": lambda inner, model: hvdlocal.SynchronousOptimizer(inner, model, bucket_bytes=None),
        "sync": lambda inner, model: hvdlocal.SynchronousOptimizer(inner, model),
        "local, H = 1": local(constant(1)),
        "local, H = 4": local(constant(4)),
        "local, H = 16": local(constant(16)),
        "QSR, H = max(2, (0.024/η)²)": local(hvdlocal.QSR(alpha=0.024, h_base=2)),
        "local-ada sketch, H = 4": local(constant(4), scaling=ada()),
        "local-ada exact, H = 4": local(constant(4), scaling=ada(statistics="exact")),
    }
    return [Run(name, wrap, steps) for name, wrap in wraps.items()]


def bare_allreduce(communicator: hvdlocal.Communicator, numel: int) -> float:
    """Returns the median seconds of a bare allreduce of this number of floats."""
    flat, seconds = torch.zeros(numel), []
    for _ in range(9):
        communicator.barrier("bench.start")
        start = time.perf_counter()
        communicator.sum_(flat, "bench.bare")
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="", help="what the link is, for the title")
    parser.add_argument("--steps", type=int, default=16, help="per trial (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    communicator = hvdlocal.init()
    torch.manual_seed(communicator.rank)
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    runs = methods(arguments.steps)
    for trial in range(arguments.trials + 1):
        for run in runs:
            run.trial(x, y, count=trial > 0)

    step = runs[0].per_step
    numel = sum(p.numel() for p in runs[0].model.parameters())
    bare = {size: bare_allreduce(communicator, size) for size in sorted({numel, *(run.payload for run in runs[1:])})}
    if communicator.rank:
        return
    print(
        f"{arguments.rate or 'link'}, {communicator.size} ranks, 1 thread each, "
        f"Horovod cycle {os.environ['HOROVOD_CYCLE_TIME']} ms; {numel / 1e6:.2f} M parameters\n"
        f"a step of plain SGD takes {1000 * step:.1f} ms, a bare allreduce of as many floats {1000 * bare[numel]:.1f} ms "
        f"({32 * numel / bare[numel] / 1e9:.2f} Gbit/s)"
    )
    print(f"{'':30}{'H':>6}{'m':>7}{'1 + m/H':>9}{'measured':>10}{'ms/step':>9}{'speed-up':>10}")
    results = {}
    for run in runs[1:]:
        m = bare[run.payload] / step
        predicted = 1 + m / run.period
        print(
            f"{run.name:30}{run.period:6.1f}{m:7.2f}{predicted:9.2f}{run.per_step / step:10.2f}"
            f"{1000 * run.per_step:9.1f}{runs[1].per_step / run.per_step:9.2f}×"
        )
        results[run.name] = {"period": run.period, "m": m, "seconds_per_step": run.seconds, "predicted": predicted}
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        facts = machine() | {"rate": arguments.rate, "step_seconds": step, "parameters": numel}
        arguments.json.write_text(json.dumps({"machine": facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
