"""LocalOptimizer agrees with the simulator of all workers, step by step, for random combinations of what becomes of an average.

The simulator computes in float64 from the equations alone; tests/unit/averaging/test_simulator.py compares it with values that
were worked out by hand.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support import simulated
from support.islands import island_of, with_islands

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
    problem: str
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


def combination(seed):
    choose = random.Random(seed)
    inner = choose.choice(list(INNER))
    outer = choose.choice(list(OUTER))
    overlap = choose.choice([0, 1, 1, 3, 5, 7])
    rule = choose.choice(list(RULES))
    return Combination(
        seed=seed,
        problem=choose.choice(["network", "quadratic"]),
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


@pytest.mark.parametrize("chosen", COMBINATIONS, ids=str)
def test_a_random_combination(comm, chosen):
    size = 2 if chosen.islands and comm.size % 2 == 0 and comm.size > 2 else 1
    workers = comm.size // size
    gain = comm.size * chosen.accumulate if chosen.linear else 1
    make_problem, make_model = PROBLEMS[chosen.problem]
    build_inner, make_inner, _ = INNER[chosen.inner]
    build_outer, make_outer = OUTER[chosen.outer]
    rule, period = RULES[chosen.rule]

    problem = make_problem(chosen.seed)
    numel = problem.start.size
    moments = {} if isinstance(chosen.moments, str) else chosen.moments
    simulator = simulated.Workers(
        problem.start,
        [make_inner(numel) for _ in range(workers)],
        lambda lr, steps: period(lr, steps * gain),
        outer=make_outer(numel),
        normalize=chosen.outer in NORMALIZED if chosen.normalize is None else chosen.normalize,
        overlap=chosen.overlap,
        mixing=chosen.mixing,
        moment_periods=INNER[chosen.inner][2][0] if chosen.moments == "average" else moments,
        reset=chosen.moments == "reset",
        budget=STEPS if chosen.budget else None,
    )
    model = make_model(problem)
    optimizer = hvdlocal.LocalOptimizer(
        build_inner(model.parameters()),
        model,
        period=rule,
        scaling=hvdlocal.LinearScaling(warmup=0) if chosen.linear else None,
        momentum=chosen.moments,
        accumulate=chosen.accumulate,
        budget=STEPS * gain if chosen.budget else None,
        outer=build_outer,
        normalize_outer=chosen.normalize,
        overlap=chosen.overlap,
        mixing=chosen.mixing,
        communicator=with_islands(comm, size),
    )

    def compare(where):
        here = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).numpy()
        expected = simulator.thetas[island_of(optimizer.communicator)]
        np.testing.assert_allclose(here, expected, rtol=5e-5, atol=5e-5, err_msg=f"{where} of {chosen!r}")
        assert (optimizer.round, optimizer.in_sync) == (
            simulator.rounds,
            simulator.steps_in_round == 0 and not simulator.pending,
        )

    compare("start")
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step) / gain
        batches = range(step * chosen.accumulate, (step + 1) * chosen.accumulate)
        simulator.step(
            [
                np.mean(
                    [
                        problem.gradient(theta, rank, batch)
                        for rank in range(worker * size, (worker + 1) * size)
                        for batch in batches
                    ],
                    axis=0,
                )
                for worker, theta in enumerate(simulator.thetas)
            ],
            rate(step),
        )
        for batch in batches:
            optimizer.zero_grad()
            model.loss(comm.rank, batch).backward()
            optimizer.step()
        compare(f"step {step + 1}")
        if step + 1 == chosen.synchronized:
            simulator.synchronize()
            optimizer.synchronize()
            compare(f"synchronize() after step {step + 1}")
    simulator.synchronize()
    optimizer.synchronize()
    compare("the end")


def test_the_combinations_hold_everything():
    """So that another table or another seed does not leave something out."""
    assert {chosen.outer for chosen in COMBINATIONS} == set(OUTER)
    assert {chosen.rule for chosen in COMBINATIONS} == set(RULES)
    assert {str(chosen.moments) for chosen in COMBINATIONS} == {
        *("local", "average", "reset"),
        *(str(periods) for _, _, choices in INNER.values() for periods in choices),
    }
    assert {(chosen.overlap > 0, chosen.mixing is not None, chosen.outer == "none") for chosen in COMBINATIONS} == {
        *((overlap, mixing, none) for overlap, mixing in ((0, 0), (1, 0), (1, 1)) for none in (0, 1))
    }
