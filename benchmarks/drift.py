"""What overlap does to the gradient statistics of LocalAdaScale: the replicas have drifted τ steps apart when they are taken.

install/mpirun -np 4 python benchmarks/drift.py

Trains a small network on the digits of scikit-learn with LocalOptimizer(overlap=τ), in rounds of H steps. At the step at which a
round's statistics are taken, every rank also computes the gradient of the same batch at the mean of the replicas, which is where
all would be without overlap. G and σ² from both (Eq. 15), averaged over the run, and the gain that follows from them (Eq. 14).
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import hvdlocal
from hvdlocal.communicator import Communicator


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def statistics(communicator: Communicator, gradient: torch.Tensor) -> tuple[float, float]:
    """Returns G and σ² from the gradients of all ranks."""
    mean, sqr = gradient.clone(), gradient.square().sum().view(1).clone()
    communicator.sum_(mean, "bench.gradient")
    communicator.sum_(sqr, "bench.norm")
    ranks = communicator.size
    return hvdlocal.gradient_statistics(sqr.item() / ranks, (mean / ranks).square().sum().item(), ranks)


def measure(communicator: Communicator, overlap: int, period: int, lr: float, rounds: int, batch: int) -> list[float]:
    """Trains, and returns G and σ² with drift, then G and σ² without."""
    x, y = (torch.from_numpy(np.ascontiguousarray(part)) for part in load_digits(return_X_y=True))
    x = x.float() / 16
    generator = torch.Generator(device="cpu").manual_seed(communicator.rank)
    model, there = network(), network()
    optimizer = hvdlocal.LocalOptimizer(
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        model,
        period=hvdlocal.ConstantPeriod(period),
        overlap=overlap,
    )
    found = []
    for step in range(rounds * period):
        chosen = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        if step >= 2 * period and step % period == overlap % period:
            drifted = statistics(communicator, flat([p.grad for p in model.parameters()]))
            mean = flat(list(model.parameters()))
            communicator.sum_(mean, "bench.mean")
            nn.utils.vector_to_parameters(mean / communicator.size, there.parameters())
            there.zero_grad()
            nn.functional.cross_entropy(there(x[chosen]), y[chosen]).backward()
            found.append([*drifted, *statistics(communicator, flat([p.grad for p in there.parameters()]))])
        optimizer.step()
    optimizer.synchronize()
    return np.mean(found, axis=0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--period", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    communicator = hvdlocal.init()
    if communicator.rank == 0:
        print(f"K = {communicator.size}, H = {given.period}, lr {given.lr}, batch {given.batch}, {given.rounds} rounds")
        print(f"{'τ':>4}{'G / G at the mean':>20}{'σ² / σ² at the mean':>22}{'gain':>8}{'at the mean':>13}{'ratio':>8}")
    for overlap in sorted({0, 1, 2, 4, given.period // 2, given.period}):
        values = measure(communicator, overlap, given.period, given.lr, given.rounds, given.batch)
        grad_sqr, grad_var, true_sqr, true_var = (max(value, 1e-12) for value in values)
        gains = [
            hvdlocal.gain_ratio(sqr, var, communicator.size, given.period)
            for sqr, var in ((grad_sqr, grad_var), (true_sqr, true_var))
        ]
        if communicator.rank == 0:
            print(
                f"{overlap:>4}{grad_sqr / true_sqr:>20.3f}{grad_var / true_var:>22.3f}{gains[0]:>8.3f}{gains[1]:>13.3f}"
                f"{gains[0] / gains[1]:>8.3f}"
            )


if __name__ == "__main__":
    main()
