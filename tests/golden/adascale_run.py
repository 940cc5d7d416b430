"""The small training run on which hvdlocal's AdaScale is compared with FairScale's.

`python tests/golden/adascale_run.py > tests/golden/adascale.json` writes what FairScale 0.4.13 computes (pip install
fairscale); tests/mpi/test_adascale_parity.py runs the same with `SynchronousOptimizer` on any number of ranks.
"""

from __future__ import annotations

import json
import sys

import torch

MICRO_BATCHES = 12  # of one step, on all workers together
STEPS = 40


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def sgd(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)


def loss(model: torch.nn.Module, step: int, micro_batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + micro_batch)
    x = torch.randn(4, 6, generator=generator)
    y = x.sum(1, keepdim=True).sin() + 0.3 * torch.randn(4, 1, generator=generator)
    return (model(x) - y).square().mean()


def main() -> None:
    from fairscale.optim import AdaScale

    network = model()
    optimizer = AdaScale(sgd(network), world_size=1, num_gradients_to_accumulate=MICRO_BATCHES)
    gains = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro_batch in range(MICRO_BATCHES):
            (loss(network, step, micro_batch) / MICRO_BATCHES).backward()
        optimizer.step()
        gains.append(optimizer.gain())
    parameters = [float(v) for p in network.parameters() for v in p.detach().flatten()]
    json.dump({"gains": gains, "parameters": parameters}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
