"""LocalOptimizer agrees with the simulator of all workers, step by step, for random combinations of what becomes of an average.

The simulator computes in float64 from the equations alone; tests/unit/averaging/test_simulator.py compares it with values that
were worked out by hand.
"""

import numpy as np
import pytest
import torch
from support.combinations import COMBINATIONS, INNER, OUTER, RULES, STEPS, rate
from support.islands import island_of, with_islands


@pytest.mark.parametrize("chosen", COMBINATIONS, ids=str)
def test_a_random_combination(comm, chosen):
    size = 2 if chosen.islands and comm.size % 2 == 0 and comm.size > 2 else 1
    workers = comm.size // size
    gain = comm.size * chosen.accumulate if chosen.linear else 1
    problem = chosen.problem()
    simulator = chosen.simulator(problem, workers, lambda steps: steps * gain)
    model = chosen.model(problem)
    optimizer = chosen.optimizer(model, with_islands(comm, size), STEPS * gain)

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
