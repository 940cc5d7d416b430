"""The cost of hvdlocal on one GPU: python benchmarks/gpu.py PART [--device cpu] [--data DIR] [--small].

Parts, each a table in Markdown on standard output:

    machine     memory bandwidth and matrix product, the ceilings of the card
    sketch      the gradient sketch against one read of the gradient
    step        host time of a local step beside the bare optimizer's
    memory      the memory of each option on the device
    averaging   an averaging against the bare collective of the same bytes; under mpirun: ranks share the GPU
    synthetic   a loop with LocalOptimizer against a bare loop: ResNet-50, one batch of 224 pixels again and again
    cifar10     the loop of `hvdlocal train` against a bare loop: ResNet-18, shards of CIFAR-10 (--data)
    jpeg        the same with ResNet-50 and shards of JPEGs (--data)

Loops alternate in one process, and a ratio is the median over the trials. A bare loop is forward pass, backward pass and
torch's SGD over a batch that is already on the device: it loads nothing, augments nothing, averages nothing and writes
nothing. Device times are measured with a full queue, so that launching is not counted; host times with an empty one.
`--device cpu` and `--small` run the same code anywhere.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HVDLOCAL_BACKEND", "mpi4py")

import torch
from local_step import NEVER, OPTIONS
from torch.nn import functional as F

import hvdlocal
from hvdlocal.averaging.sketch import GradientSketch, default_size
from hvdlocal.communicator import SingleProcess
from hvdlocal.models import build_model

Work = Callable[[], object]


@dataclass(frozen=True)
class Place:
    """The device of a measurement, and the amount of work."""

    device: torch.device
    small: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def models(self) -> dict[str, tuple[int, int, int]]:
        """Returns models by name, with the shape of their images."""
        if self.small:
            return {"resnet9_narrow": (32, 32, 3)}
        return {"resnet50": (224, 224, 3), "vit_b_16": (224, 224, 3)}

    def finish(self) -> None:
        """Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def device_seconds(self, work: Work, repeats: int = 20) -> float:
        """Returns the median device time of `work`, which is launched while the device is busy with something else."""
        for _ in range(3):
            work()
        found = []
        for _ in range(3 if self.small else repeats):
            self.finish()
            if not self.on_gpu:
                found.append(seconds(work))
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(20_000_000)  # cycles: some 10 ms in which the host can launch everything
            begin.record()
            work()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(found)

    def host_seconds(self, work: Work, before: Work = lambda: None, repeats: int = 30) -> float:
        """Returns the median time until `work` returns, with an idle device."""
        found = []
        for trial in range(8 if self.small else repeats):
            before()
            self.finish()
            taken = seconds(work)
            if trial >= 3:
                found.append(taken)
        self.finish()
        return statistics.median(found)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def row(*cells: object) -> None:
    """Prints a row of a Markdown table and flushes it."""
    print(
        "| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True
    )


def head(*cells: str) -> None:
    print()
    row(*cells)
    row(*["---"] * len(cells))


def gradients_of(name: str, shape: tuple[int, int, int], device: torch.device) -> list[torch.Tensor]:
    return [torch.randn(p.shape, device=device) for p in build_model(name, 1000, shape).parameters()]


def machine(place: Place) -> None:
    """Measures the ceilings: a copy, a read, and a bfloat16 matrix product."""
    numel, side = (1 << 18, 256) if place.small else (1 << 29, 8192)
    a, b = torch.randn(numel, device=place.device), torch.empty(numel, device=place.device)
    copied = place.device_seconds(lambda: b.copy_(a))
    read = place.device_seconds(lambda: torch.linalg.vector_norm(a))
    x, y = (torch.randn(side, side, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    product = place.device_seconds(lambda: x @ y)
    head("ceiling", "measured")
    row("copy, read plus written", f"{8 * numel / copied / 1e9:.0f} GB/s")
    row("read (norm)", f"{4 * numel / read / 1e9:.0f} GB/s")
    row(f"bfloat16 matrix product, side {side}", f"{2 * side**3 / product / 1e12:.3g} TFLOP/s")


def sketch(place: Place) -> None:
    """Measures the device time of a projection, in reads of the gradient."""
    head("gradient of", "parameters", "sketch", "read, µs", "sketch, µs", "ratio", "host, µs")
    for name, shape in place.models().items():
        gradients = gradients_of(name, shape, place.device)
        numels = [g.numel() for g in gradients]
        flat = torch.randn(sum(numels), device=place.device)
        projection = GradientSketch(numels, default_size(sum(numels)), place.device)
        out = torch.empty(projection.size, device=place.device)
        read = place.device_seconds(lambda flat=flat: torch.linalg.vector_norm(flat))
        work = lambda p=projection, g=gradients, o=out: p.project(g, o)  # noqa: E731
        device = place.device_seconds(work)
        row(name, sum(numels), projection.size, 1e6 * read, 1e6 * device, device / read, 1e6 * place.host_seconds(work))


def step(place: Place) -> None:
    """Measures the host time of `step()` for the options, in turn, always with the gradients of one batch."""
    name, shape = next(iter(place.models().items()))
    gradients = gradients_of(name, shape, place.device)
    candidates: dict[str, tuple[Work, Work]] = {}  # what is timed, and what comes before
    for option, settings in {"bare SGD": None, **OPTIONS}.items():
        if option.startswith("accumulating"):
            continue  # two calls are a step
        optimizer = optimizer_of(build_model(name, 1000, shape).to(place.device), settings)
        set_gradients(optimizer, gradients)
        optimizer.step()  # the first step, with its statistics, of a round that never ends
        candidates[option] = optimizer.step, lambda: None
    for statistics_ in ("sketch", "exact"):
        settings = {"scaling": hvdlocal.LocalAdaScale(statistics=statistics_)}
        optimizer = optimizer_of(build_model(name, 1000, shape).to(place.device), settings)
        set_gradients(optimizer, gradients)
        candidates[f"first step of a round, {statistics_}"] = optimizer.step, optimizer.synchronize
    times: dict[str, list[float]] = {option: [] for option in candidates}
    for trial in range(8 if place.small else 60):
        for option, (work, before) in candidates.items():
            before()
            place.finish()
            taken = seconds(work)
            if trial >= 3:
                times[option].append(taken)
    head(f"{name}: step() that does not average", "host, µs", "more than bare, µs", "device, µs")
    for option, found in times.items():
        more = statistics.median(mine - bare for mine, bare in zip(found, times["bare SGD"], strict=True))
        device = 1e6 * place.device_seconds(candidates[option][0]) if option in ("bare SGD", *OPTIONS) else ""
        row(option, 1e6 * statistics.median(found), 1e6 * more, device)


def optimizer_of(model: torch.nn.Module, settings: dict | None, **more: object) -> torch.optim.Optimizer:
    """Returns SGD with momentum, bare or in a LocalOptimizer whose round does not end by itself."""
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if settings is None:
        return optimizer
    settings = {"period": hvdlocal.ConstantPeriod(NEVER), "communicator": SingleProcess(size=2), **settings, **more}
    return hvdlocal.LocalOptimizer(optimizer, model, **settings)


def set_gradients(optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient


def memory(place: Place) -> None:
    """Measures the memory after some steps and an averaging, in multiples of the parameters, and the averaging's peak."""
    if not place.on_gpu:
        print("\nMemory is counted on a GPU; for the CPU see benchmarks/local_step.py.")
        return
    name, shape = next(iter(place.models().items()))
    one = torch.ones(1, 1, 1, device=place.device)
    torch.bmm(one, one)  # the libraries' workspace is not counted
    torch.dot(one.view(1), one.view(1))
    head(f"{name}, SGD with momentum", "allocated, × parameters", "more than bare", "an averaging needs more, MB")
    bare = 0.0
    for option, settings in {"bare SGD": None, **OPTIONS}.items():
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = build_model(name, 1000, shape).to(place.device)
        optimizer = optimizer_of(model, settings)
        for _ in range(4):
            set_gradients(optimizer, gradients_of(name, shape, place.device))
            optimizer.step()
        torch.cuda.reset_peak_memory_stats()
        alive = torch.cuda.memory_allocated()
        if isinstance(optimizer, hvdlocal.LocalOptimizer):
            optimizer.synchronize()
        peak = torch.cuda.max_memory_allocated() - alive
        total = (torch.cuda.memory_allocated() - before) / 4 / sum(p.numel() for p in model.parameters())
        bare = bare or total
        row(option, total, total - bare, peak / 1e6)
        del model, optimizer


def averaging(place: Place) -> None:
    """Measures an averaging of ranks that share the device, over mpi4py through host memory."""
    from averaging import Candidate, Weights, ratio, run_trials

    communicator = hvdlocal.init()
    variants: dict[str, dict] = {
        "hvdlocal plain": {},
        "hvdlocal with sketch": {"scaling": hvdlocal.LocalAdaScale()},
        "hvdlocal with exact statistics": {"scaling": hvdlocal.LocalAdaScale(statistics="exact")},
        "hvdlocal with moments": {"momentum": "average"},
    }
    for name, shape in place.models().items():
        model = build_model(name, 1000, shape).to(place.device)
        gradients = gradients_of(name, shape, place.device)
        flat = torch.zeros(sum(p.numel() for p in model.parameters()), device=place.device)
        candidates = [Candidate("bare collective", waited(place, lambda f=flat: communicator.sum_(f, "bare")))]
        for title, settings in variants.items():
            weights = Weights(model)
            optimizer = optimizer_of(weights, settings, communicator=communicator)
            set_gradients(optimizer, gradients)
            candidates.append(Candidate(title, waited(place, optimizer.synchronize), waited(place, optimizer.step)))
        run_trials(candidates, 2 if place.small else 5)
        if communicator.rank == 0:
            head(f"{name}, {communicator.size} ranks: one averaging", "ms", "× bare collective")
            for one in candidates:
                row(one.name, 1e3 * statistics.median(one.seconds), ratio(one, candidates[0]))


def waited(place: Place, work: Work) -> Work:
    """Returns `work` followed by a wait for the device."""

    def run() -> None:
        work()
        place.finish()

    return run


class Bare:
    """A bare training loop over one batch that is already on the device."""

    def __init__(self, place: Place, model: torch.nn.Module, batch: int, shape: tuple[int, int, int], classes: int):
        height, width, channels = shape
        self.place, self.model = place, model.to(place.device).to(memory_format=torch.channels_last).train()
        x = torch.randn(batch, channels, height, width, device=place.device)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.y = torch.randint(classes, (batch,), device=place.device)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4
        )

    def step(self) -> torch.Tensor:
        with self.place.autocast():
            loss = F.cross_entropy(self.model(self.x), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss

    def seconds(self, steps: int) -> float:
        self.place.finish()
        return seconds(lambda: ([self.step() for _ in range(steps)], self.place.finish()))


def synthetic(place: Place) -> None:
    """Measures the cost of the library in a user's own loop."""
    name, shape = next(iter(place.models().items()))
    batch, steps, trials = (4, 2, 2) if place.small else (128, 25, 5)
    bare = Bare(place, build_model(name, 1000, shape), batch, shape, 1000)
    loops = {"LocalOptimizer, H = 8": {}, "with LocalAdaScale, H = 8": {"scaling": hvdlocal.LocalAdaScale()}}
    ours: dict[str, Bare] = {}
    for title, settings in loops.items():
        loop = Bare(place, build_model(name, 1000, shape), batch, shape, 1000)
        inner = loop.optimizer
        loop.optimizer = hvdlocal.LocalOptimizer(
            inner, loop.model, period=hvdlocal.ConstantPeriod(8), communicator=SingleProcess(size=2), **settings
        )
        ours[title] = loop
    for loop in (bare, *ours.values()):
        loop.seconds(max(3, steps // 3))
    times: dict[str, list[float]] = {title: [] for title in ("bare", *ours)}
    for _ in range(trials):
        for title, loop in {"bare": bare, **ours}.items():
            times[title].append(loop.seconds(steps))
    report_loops(
        f"{name}, bfloat16, channels_last, batches of {batch}, one batch again and again", batch * steps, times
    )


def report_loops(title: str, images: int, times: dict[str, list[float]]) -> None:
    head(title, "images/s", "× bare loop")
    for name, found in times.items():
        speed = statistics.median(bare / mine for bare, mine in zip(times["bare"], found, strict=True))
        row(name, f"{images / statistics.median(found):,.0f}", speed)


class Enough(BaseException):
    """Ends a run whose measurement is complete."""


def train_loop(place: Place, title: str, config: object, batch: int, steps: int, trials: int) -> None:
    """Measures the loop of a real run, which alternates with the same number of steps of a bare loop."""
    from hvdlocal.training import Trainer

    trainer = Trainer(config, hvdlocal.init())
    shape, classes = trainer.session.preprocessing.shape, trainer.session.train_data.num_classes
    bare = Bare(place, build_model(config.model.name, classes, shape), batch, shape, classes)
    bare.seconds(max(3, steps // 3))
    times: dict[str, list[float]] = {"bare": [], "hvdlocal train": []}
    waiting: list[float] = []
    original, done, began = trainer.step.update, 0, (0.0, 0.0)
    warm = max(4, steps // 2)

    def update() -> None:
        nonlocal done, began
        original()
        done += 1
        if done == warm:  # the first batches after a pause were ready, so they do not count
            place.finish()
            began = time.perf_counter(), trainer.state.totals.waiting_for_data
        if done == warm + steps:
            place.finish()
            times["hvdlocal train"].append(time.perf_counter() - began[0])
            waiting.append((trainer.state.totals.waiting_for_data - began[1]) / times["hvdlocal train"][-1])
            times["bare"].append(bare.seconds(steps))
            done = 0
            if len(times["bare"]) == trials:
                raise Enough

    trainer.step.update = update
    try:
        trainer.run()
    except Enough:
        trainer.coordinator.writer.close()
    report_loops(title, batch * steps, times)
    print(f"\nOf its time, `hvdlocal train` waited {statistics.median(waiting):.1%} for data.", flush=True)


def configuration(place: Place, data: Path, output: str, model: str, batch: int, **settings: object) -> object:
    """Returns the configuration of a run that continues until `Enough` ends it."""
    from hvdlocal.training.config import (
        DataConfig,
        MethodConfig,
        ModelConfig,
        OptimizerConfig,
        PeriodConfig,
        TrainConfig,
    )

    return TrainConfig(
        data=DataConfig(str(data), batch_size=batch, flip=True, **settings),
        model=ModelConfig(model, channels_last=True),
        output=output,
        epochs=1e6,
        evaluate_every_epochs=1e6,
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=5e-4),
        method=MethodConfig("local-ada", period=PeriodConfig(period=8)),
        precision="bfloat16",
        device=place.device.type,
    )


def cifar10(place: Place, data: Path) -> None:
    """Measures images of fixed size: crop and flip on the device."""
    model = "resnet9_narrow" if place.small else "resnet18_cifar"
    for batch, steps, trials in [(16, 3, 2)] if place.small else [(128, 80, 5), (512, 50, 5)]:
        with tempfile.TemporaryDirectory() as folder:
            config = configuration(place, data, folder, model, batch, crop_padding=4)
            title = f"{model}, images of 32 pixels from shards, bfloat16, channels_last, batches of {batch}"
            train_loop(place, title, config, batch, steps, trials)


def jpeg(place: Place, data: Path) -> None:
    """Measures JPEGs that the host's cores decode."""
    model, size = ("resnet9_narrow", 32) if place.small else ("resnet50", 224)
    batch, steps, trials = (8, 3, 2) if place.small else (128, 20, 4)
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(place, data, folder, model, batch, image_size=size)
        title = f"{model}, JPEG shards at {size} pixels, bfloat16, channels_last, batches of {batch}"
        train_loop(place, title, config, batch, steps, trials)
    print(f"\nDecoded by {len(os.sched_getaffinity(0)) - 1 or 1} threads.", flush=True)


PARTS: dict[str, Callable] = {
    one.__name__: one for one in (machine, sketch, step, memory, averaging, synthetic, cifar10, jpeg)
}


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="little work: to see that it runs")
    parser.add_argument("--data", type=Path, help="directory of a data set in hvdlocal's format")
    given = parser.parse_args(arguments)
    device = torch.device("cuda", 0) if given.device == "cuda" else torch.device("cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this torch finds no GPU: --device cpu --small runs the same code on the CPU")
    torch.manual_seed(0)
    place = Place(device, given.small)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if given.part in ("cifar10", "jpeg"):
            if given.data is None:
                parser.error(f"{given.part} needs --data")
            PARTS[given.part](place, given.data)
        else:
            PARTS[given.part](place)


if __name__ == "__main__":
    main()
