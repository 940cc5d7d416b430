"""Training goes on after a loss as if the lost ranks had left at that average: values that were worked out by hand.

Rank k's loss is c·Σw with c = 2^k, so that each step of SGD at the rate 1 moves its weights, which begin at 5, by −c times the
gain. A death is noticed at the average to which the rank does not come.
"""

import pytest
from support.models import Slope, local, step
from support.mortal import Death, run_mortal

AVERAGE = "hvdlocal.average"


def weight(model):
    """The weights, which are all equal."""
    assert len(model.w.unique()) == 1
    return model.w[0].item()


def test_the_mean_is_that_of_the_ranks_that_are_left():
    def body(comm):
        c = 2.0**comm.rank
        model, told = Slope(), []
        optimizer = local(model, 2, communicator=comm, on_loss=told.append)
        seen = []
        for _ in range(6):
            step(optimizer, model, c)
            seen.append((weight(model), optimizer.num_workers, len(told)))
        return seen, [(loss.ranks, loss.remaining, loss.collective) for loss in told]

    _, one, two, lost = run_mortal(4, body, Death(3, AVERAGE, 2), Death(0, AVERAGE, 3))
    assert lost is None
    seen, told = one
    # 5 − 2·(1 + 2 + 4 + 8)/4 = −2.5, then −2.5 − 2·(1 + 2 + 4)/3, then a mean over 2 and 4.
    ends = [-2.5, -2.5 - 14 / 3, -2.5 - 14 / 3 - 6]
    assert [value for value, _, _ in seen[1::2]] == pytest.approx(ends)
    assert [rest for _, *rest in seen] == [[4, 0]] * 3 + [[3, 1]] * 2 + [[2, 2]]
    assert told == [((3,), 3, AVERAGE), ((0,), 2, AVERAGE)]
    assert two[0][1::2] == seen[1::2]
    assert two[1] == told
