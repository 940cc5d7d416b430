"""The cost of a local step without averaging compared with the bare optimizer's, and the memory of each option.

python benchmarks/local_step.py

The network is that of experiments/cifar10_small.yaml (ResNet-9 a quarter as wide) with SGD and momentum, in one process with one
thread. The overhead is Python's, so its share falls with the size of the model. Memory is that of a ResNet-18 with 11.2 M
parameters; two ranks are simulated, since a single rank needs no statistics.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.nn import functional as F

import hvdlocal
from hvdlocal.communicator import SingleProcess
from hvdlocal.models import build_model

NEVER = 10**9
TRIALS = 60


OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "with sketch": {"scaling": hvdlocal.LocalAdaScale()},
    "with exact statistics": {"scaling": hvdlocal.LocalAdaScale(statistics="exact")},
    "moments averaged": {"momentum": "average"},
    "accumulating 2 micro-batches": {"accumulate": 2},
    "outer optimizer": {"outer": hvdlocal.nesterov()},
    "overlap": {"overlap": 1},
    "overlap and outer optimizer": {"overlap": 1, "outer": hvdlocal.nesterov()},
}


def build(
    settings: dict[str, object] | None, name: str = "resnet9_narrow", period: int = NEVER
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = build_model(name, 10, (32, 32, 3))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if settings is not None:
        rule = hvdlocal.ConstantPeriod(period)
        optimizer = hvdlocal.LocalOptimizer(
            optimizer, model, period=rule, communicator=SingleProcess(size=2), **settings
        )  # type: ignore[arg-type]
    return model, optimizer


def training_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], float]:
    """Returns a function that runs a whole iteration and returns the seconds of `optimizer.step()` in it."""
    x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))

    def run() -> float:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        start = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start

    return run


def times() -> None:
    candidates = {
        "bare SGD": build(None),
        **{name: build(settings) for name, settings in OPTIONS.items() if name == "plain"},
    }
    runs = {name: training_step(*pair) for name, pair in candidates.items()}
    whole: dict[str, list[float]] = {name: [] for name in runs}
    alone: dict[str, list[float]] = {name: [] for name in runs}
    for trial in range(TRIALS + 5):
        for name, run in runs.items():
            start = time.perf_counter()
            step = run()
            if trial >= 5:
                whole[name].append(time.perf_counter() - start)
                alone[name].append(step)
    print(f"{'':24}{'iteration, ms':>15}{'ratio':>8}{'step(), ms':>12}{'ratio':>8}{'more, µs':>10}")
    for name in runs:
        ratio = statistics.median(a / b for a, b in zip(whole[name], whole["bare SGD"], strict=True))
        more = statistics.median(alone[name]) - statistics.median(alone["bare SGD"])
        print(
            f"{name:24}{1e3 * statistics.median(whole[name]):15.2f}{ratio:8.3f}"
            f"{1e3 * statistics.median(alone[name]):12.3f}"
            f"{statistics.median(alone[name]) / statistics.median(alone['bare SGD']):8.3f}{1e6 * more:10.0f}"
        )


def allocated(settings: dict[str, object] | None) -> tuple[float, float]:
    """Trains some steps with averagings in between, gradients and momentum included.

    Returns:
        Floats per parameter in memory at the end, and the most at any time.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model, optimizer = build(settings, "resnet18_cifar", period=2)
        x, y = torch.randn(2, 3, 32, 32), torch.randint(10, (2,))
        for _ in range(7):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        if isinstance(optimizer, hvdlocal.LocalOptimizer):
            optimizer.synchronize()
        del x, y
    numel = sum(p.numel() for p in model.parameters())
    kineto = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in kineto if event.name() == "[memory]")
    inside = list(accumulate(change for _, change in changes))
    del optimizer
    return inside[-1] / 4 / numel, max(inside) / 4 / numel


def main() -> None:
    torch.set_num_threads(1)
    times()
    bare, bare_peak = allocated(None)
    print(f"\n{'':32}{'memory, × parameters':>22}{'more than bare':>16}{'at its peak':>14}{'more':>8}")
    print(f"{'bare SGD with momentum':32}{bare:22.2f}{0:16.2f}{bare_peak:14.2f}{0:8.2f}")
    for name, settings in OPTIONS.items():
        alive, peak = allocated(settings)
        print(f"{name:32}{alive:22.2f}{alive - bare:16.2f}{peak:14.2f}{peak - bare_peak:8.2f}")


if __name__ == "__main__":
    main()
