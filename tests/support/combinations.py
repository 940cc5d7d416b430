"""Random combinations of what becomes of an average, each for hvdlocal and for the simulator of all workers (`simulated.py`)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from support import simulated

import hvdlocal

STEPS = 24
LARGEST_RATE = 0.05

RULES = {
    "H = 1": (hvdlocal.ConstantPeriod(1), lambda lr, done: 1),
    "H = 3": (hvdlocal.ConstantPeriod(3), lambda lr, done: 3),
    "H = 5": (hvdlocal.ConstantPeriod(5), lambda lr, done: 5),
    "QSR": (hvdlocal.QSR(alpha=0.0625, h_base=2), lambda lr, done: max(2, math.floor((0.0625 / lr) ** 2))),
    "post-local": (hvdlocal.PostLocal(switch=4, period=4), lambda lr, done: 4 if done >= 4 else 1),
}
"""Rules for H, each as hvdlocal has it and as a function of the rate and the steps done."""

OUTER = {
    "none": (None, lambda size: None),
    "plain": (hvdlocal.nesterov(lr=1.0, momentum=0.0), lambda size: simulated.OuterSGD(1.0)),
    "nesterov": (
        hvdlocal.nesterov(lr=0.7, momentum=0.9),
        lambda size: simulated.OuterSGD(0.7, 0.9, nesterov=True),
    ),
    "slowmo": (hvdlocal.slowmo(momentum=0.5), lambda size: simulated.OuterSGD(1.0, 0.5)),
    "heavy ball": (
        lambda phi: torch.optim.SGD(phi, lr=0.6, momentum=0.8),
        lambda size: simulated.OuterSGD(0.6, 0.8),
    ),
    "sgd": (lambda phi: torch.optim.SGD(phi, lr=1.3), lambda size: simulated.OuterSGD(1.3)),
    "adam": (
        lambda phi: torch.optim.Adam(phi, lr=0.05, betas=(0.9, 0.95)),
        lambda size: simulated.OuterAdam(size, 0.05),
    ),
}
"""Outer optimizers, each for hvdlocal and as the simulator's for a φ of `size` numbers."""

NORMALIZED = {"slowmo"}
"""The outer optimizers that are normalised by the round's path if nothing else is said."""

INNER = {
    "sgd": (
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda size: simulated.SGD(size, 0.9, 0.01),
        ({"momentum_buffer": 1}, {"momentum_buffer": 2}, {"momentum_buffer": 3}),
    ),
    "adamw": (
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, betas=(0.9, 0.99), weight_decay=0.01),
        lambda size: simulated.AdamW(size, (0.9, 0.99), 0.01),
        (
            {"exp_avg": 1, "exp_avg_sq": 1},
            {"exp_avg": 2, "exp_avg_sq": 4},
            {"exp_avg": 3, "exp_avg_sq": 3},
            {"exp_avg_sq": 2},
        ),
    ),
}
"""Inner optimizers, each of torch and of the simulator, and the periods of their moments."""


@dataclass
class Combination:
    """What a test combines; the tables above have the names."""

    seed: int
    problem_name: str
    inner: str
    rule: str
    outer: str
    normalize: bool | None
    overlap: int
    mixing: float | None
    moments: str | dict[str, int]
    accumulate: int
    islands: bool
    linear: bool
    budget: bool
    synchronized: int | None

    def __str__(self):
        return f"{self.seed}"

    def problem(self):
        """The simulator's problem."""
        return PROBLEMS[self.problem_name][0](self.seed)

    def model(self, problem):
        """The problem as a torch model."""
        return PROBLEMS[self.problem_name][1](problem)

    def simulator(
        self,
        problem,
        workers: int,
        progress: Callable[[int], float] = lambda steps: steps,
        deaths: Mapping[int, Collection[int]] = MappingProxyType({}),
    ) -> simulated.Workers:
        """All workers.

        Args:
            problem: of this combination.
            workers: K.
            progress: from the steps done, as hvdlocal counts it.
            deaths: see `simulated.Workers`.
        """
        numel = problem.start.size
        make_inner, choices = INNER[self.inner][1:]
        rule = RULES[self.rule][1]
        moments = {} if isinstance(self.moments, str) else self.moments
        return simulated.Workers(
            problem.start,
            [make_inner(numel) for _ in range(workers)],
            lambda lr, steps: rule(lr, progress(steps)),
            outer=OUTER[self.outer][1](numel),
            normalize=self.outer in NORMALIZED if self.normalize is None else self.normalize,
            overlap=self.overlap,
            mixing=self.mixing,
            moment_periods=choices[0] if self.moments == "average" else moments,
            reset=self.moments == "reset",
            budget=STEPS if self.budget else None,
            deaths=deaths,
        )

    def optimizer(self, model, communicator, budget: float | None, **settings) -> hvdlocal.LocalOptimizer:
        """This rank's replica.

        Args:
            model: see `model`.
            communicator: the ranks.
            budget: S, if the combination has one.
            settings: others of `LocalOptimizer`.
        """
        return hvdlocal.LocalOptimizer(
            INNER[self.inner][0](model.parameters()),
            model,
            period=RULES[self.rule][0],
            scaling=hvdlocal.LinearScaling(warmup=0) if self.linear else None,
            momentum=self.moments,
            accumulate=self.accumulate,
            budget=budget if self.budget else None,
            outer=OUTER[self.outer][0],
            normalize_outer=self.normalize,
            overlap=self.overlap,
            mixing=self.mixing,
            communicator=communicator,
            **settings,
        )


def combination(seed):
    choose = random.Random(seed)
    inner = choose.choice(list(INNER))
    outer = choose.choice(list(OUTER))
    overlap = choose.choice([0, 1, 1, 3, 5, 7])
    rule = choose.choice(list(RULES))
    return Combination(
        seed=seed,
        problem_name=choose.choice(["network", "quadratic"]),
        inner=inner,
        rule=rule,
        outer=outer,
        normalize=None if outer == "none" else choose.choice([None, True, False]),
        overlap=overlap,
        mixing=choose.choice([None, None, 0.5, 0.2]) if overlap else None,
        moments=choose.choice(["local", "average", "reset", *INNER[inner][2]]),
        accumulate=choose.choice([1, 1, 2]),
        islands=choose.choice([False, True]),
        linear=choose.choice([False, False, True]),
        budget=choose.choice([False, True]),
        synchronized=choose.choice([None, None, choose.randrange(1, STEPS)]),
    )


COMBINATIONS = [combination(seed) for seed in range(48)]


class Quadratic(torch.nn.Module):
    """The simulator's quadratic, in float32."""

    def __init__(self, problem):
        super().__init__()
        self.problem = problem
        self.theta = torch.nn.Parameter(torch.from_numpy(problem.start).float())

    def loss(self, rank, batch):
        a, minimum, noise = (
            torch.from_numpy(numbers).float()
            for numbers in (self.problem.curvatures, self.problem.minimum, self.problem.noise(rank, batch))
        )
        return (0.5 * a * (self.theta - minimum) ** 2 + noise * self.theta).sum()


class Network(torch.nn.Module):
    """The simulator's network, in float32."""

    def __init__(self, problem):
        super().__init__()
        self.problem = problem
        inputs, hidden, outputs = problem.widths
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(inputs, hidden, dtype=torch.float32),
            torch.nn.Tanh(),
            torch.nn.Linear(hidden, outputs, dtype=torch.float32),
        )
        with torch.no_grad():
            for parameter, start in zip(self.parameters(), problem.split(problem.start), strict=True):
                parameter.copy_(torch.from_numpy(start))

    def loss(self, rank, batch):
        x, target = (torch.from_numpy(numbers).float() for numbers in self.problem.data(rank, batch))
        return 0.5 * ((self.layers(x) - target) ** 2).sum(1).mean()


PROBLEMS = {"quadratic": (simulated.Quadratic, Quadratic), "network": (simulated.Network, Network)}


def rate(step):
    """A learning rate that halves twice, so that QSR's rounds become longer."""
    return LARGEST_RATE / 2 ** (step // 8)
