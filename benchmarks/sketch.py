"""Error and time of the gradient sketch on the gradient of a ResNet-18 for real CIFAR-10 images.

python benchmarks/sketch.py data/cifar10      (python -m data_prep cifar10 … first)
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from hvdlocal.averaging.sketch import GradientSketch
from hvdlocal.data import Normalize, ShardedDataset
from hvdlocal.models import build_model


def gradient(model: torch.nn.Module, data: ShardedDataset, first: int, batch_size: int) -> list[torch.Tensor]:
    samples = np.arange(first, first + batch_size)
    x = Normalize(data.mean, data.std)(torch.from_numpy(data.take(samples)))
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(x), torch.from_numpy(data.labels[samples]).long()).backward()
    return [p.grad.detach().clone().view(-1) for p in model.parameters()]


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="directory of CIFAR-10 in hvdlocal's format")
    parser.add_argument("--gradients", type=int, default=3)
    parser.add_argument("--draws", type=int, default=16, help="random projections to take the error over")
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = ShardedDataset(arguments.data)
    model = build_model("resnet18_cifar", data.num_classes, data.shape)
    batch = arguments.batch_size
    gradients = [gradient(model, data, i * batch, batch) for i in range(arguments.gradients)]
    numels = [g.numel() for g in gradients[0]]
    print(f"ResNet-18, {sum(numels):,} parameters, {len(gradients)} gradients of {batch} images, one thread")
    flat = torch.cat(gradients[0])
    print(f"{'size':>7}  {'payload':>8}  {'error of |g|^2 (r.m.s.)':>24}  {'theory':>7}  {'time / dot product':>18}")
    for size in (1024, 4096, 16384, 65536):
        out = torch.empty(size)
        errors = []
        for seed in range(arguments.draws):
            sketch = GradientSketch(numels, size, flat.device, seed)
            for g in gradients:
                sketch.project(g, out)
                errors.append(float(torch.dot(out, out)) / sum(float(torch.dot(t, t)) for t in g) - 1)
        rms = (sum(e * e for e in errors) / len(errors)) ** 0.5
        ratio = time_ratio(sketch, gradients[0], flat, out)
        print(f"{size:7}  {size / len(flat):8.2%}  {rms:24.2%}  {(2 / size) ** 0.5:7.2%}  {ratio:18.2f}")


def time_ratio(sketch: GradientSketch, gradients: list[torch.Tensor], flat: torch.Tensor, out: torch.Tensor) -> float:
    """Returns the median ratio of 31 interleaved pairs, so that a slow moment of the machine affects both."""
    ratios = []
    for _ in range(31):
        projecting = milliseconds(lambda: sketch.project(gradients, out))
        ratios.append(projecting / milliseconds(lambda: torch.dot(flat, flat)))
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
