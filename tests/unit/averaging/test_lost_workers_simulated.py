"""LocalOptimizer agrees with the simulator of workers of which some leave, for random combinations of what becomes of an average.

As tests/mpi/test_simulated.py does without losses. A rank dies as it comes to the average of a round, and the workers that are
left average without it.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.combinations import COMBINATIONS, STEPS, rate
from support.mortal import Death, run_mortal

RANKS = 4


def deaths_of(seed):
    """Up to three of four ranks and the rounds at whose average they die, by round."""
    choose = random.Random(1000 + seed)
    deaths = {}
    for rank in choose.sample(range(RANKS), choose.choice([1, 1, 2, 3])):
        deaths.setdefault(choose.choice([1, 2, 2, 3]), set()).add(rank)
    return deaths


@pytest.mark.parametrize("chosen", COMBINATIONS, ids=str)
def test_a_random_combination(chosen):
    chosen = replace(chosen, islands=False, budget=chosen.budget and not chosen.linear)
    problem, deaths = chosen.problem(), deaths_of(chosen.seed)
    full = RANKS * chosen.accumulate if chosen.linear else 1
    states, occurrences = simulate(chosen, problem, deaths, full)
    told = {rank: [] for rank in range(RANKS)}

    def body(comm):
        own = comm.rank
        model = chosen.model(problem)
        optimizer = chosen.optimizer(model, comm, STEPS, on_loss=told[own].append)
        trace = []

        def note():
            here = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).numpy()
            trace.append((here, optimizer.round, optimizer.in_sync, optimizer.num_workers))
            expected, *facts = states[len(trace) - 1]
            np.testing.assert_allclose(here, expected[own], rtol=5e-5, atol=5e-5, err_msg=f"{len(trace)} of {chosen!r}")
            assert trace[-1][1:] == tuple(facts)

        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = rate(step) / full
            for batch in range(step * chosen.accumulate, (step + 1) * chosen.accumulate):
                optimizer.zero_grad()
                model.loss(own, batch).backward()
                optimizer.step()
            note()
            if step + 1 == chosen.synchronized:
                optimizer.synchronize()
                note()
        optimizer.synchronize()
        note()
        return trace

    victims = [
        Death(rank, "hvdlocal.average", occurrences[number]) for number, ranks in deaths.items() for rank in ranks
    ]
    traces = run_mortal(RANKS, body, *victims)
    lost = [rank for ranks in deaths.values() for rank in ranks]
    assert [rank for rank, trace in enumerate(traces) if trace is None] == sorted(lost)
    first, *others = [trace for trace in traces if trace is not None]
    for trace in others:
        for (one, _, in_sync, _), (other, *_) in zip(first, trace, strict=True):
            assert not in_sync or one.tobytes() == other.tobytes(), "the ranks that are left have the same bits"
    for rank, trace in enumerate(traces):
        if trace is not None:
            assert [set(loss.ranks) for loss in told[rank]] == [ranks for _, ranks in sorted(deaths.items())]


def simulate(chosen, problem, deaths, full):
    """Runs the simulator.

    Returns:
        After every step and every `synchronize`: by worker θ, the rounds, whether all are equal, and K. And by round, which of
        the collectives of that name its average is.
    """
    done = 0.0
    simulator = chosen.simulator(problem, RANKS, lambda steps: done, deaths)
    states, occurrences, comparisons = [], {}, 0

    def note():
        for number in range(len(occurrences) + 1, simulator.rounds + 1):
            occurrences[number] = number + comparisons
        thetas = dict(zip(simulator.present, simulator.thetas, strict=True))
        in_sync = simulator.steps_in_round == 0 and not simulator.pending
        states.append((thetas, simulator.rounds, in_sync, simulator.num_workers))

    def synchronize():
        nonlocal comparisons
        compared = not simulator.steps_in_round
        simulator.synchronize()
        note()
        comparisons += compared

    for step in range(STEPS):
        gain = simulator.num_workers * chosen.accumulate if chosen.linear else 1
        batches = range(step * chosen.accumulate, (step + 1) * chosen.accumulate)
        simulator.step(
            [
                np.mean([problem.gradient(theta, worker, batch) for batch in batches], axis=0)
                for worker, theta in zip(simulator.present, simulator.thetas, strict=True)
            ],
            gain * rate(step) / full,
        )
        done += gain
        note()
        if step + 1 == chosen.synchronized:
            synchronize()
    synchronize()
    return states, occurrences
