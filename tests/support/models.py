"""Small models whose training has a closed form, and brute-force references over all ranks."""

from __future__ import annotations

import torch

import hvdlocal


class Slope(torch.nn.Module):
    """loss = c · Σw: the gradient is the constant c in every coordinate, so plain SGD moves all of w by −lr·c a step."""

    def __init__(self, numel: int = 10, start: float = 5.0) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((numel,), start))

    def forward(self, c: float) -> torch.Tensor:
        return c * self.w.sum()


def slopes(comm) -> list[float]:
    """A different c on every rank: 1, 2, 4, 8 …"""
    return [float(2**rank) for rank in range(comm.size)]


def mean(values) -> float:
    return sum(values) / len(values)


def step(optimizer, model, c: float) -> None:
    optimizer.zero_grad()
    loss = model(c)
    loss.backward()
    optimizer.record_loss(loss)
    optimizer.step()


def sgd(model, lr=1.0, **settings):
    return torch.optim.SGD(model.parameters(), lr=lr, **settings)


def local(model, period=1, *, optimizer=None, **settings):
    if isinstance(period, int):
        period = hvdlocal.ConstantPeriod(period)
    return hvdlocal.LocalOptimizer(optimizer or sgd(model), model, period=period, **settings)


def small_network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 4 * 4, 3)
    )


def batch(seed: int, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 2, 6, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def backward(model, seed: int, size: int = 6) -> torch.Tensor:
    x, y = batch(seed, size)
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def flat_gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.detach().reshape(-1) for p in model.parameters()])


def everywhere_equal(comm, tensor: torch.Tensor) -> bool:
    """Whether all ranks hold the same bits."""
    return len(set(comm.gather(tensor.contiguous().numpy().tobytes(), "test.bits"))) == 1
