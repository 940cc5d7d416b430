"""What is made of the times of a round with overlap."""

from types import SimpleNamespace

import pytest

from hvdlocal.advise.overlap_trial import OverlapTrial
from hvdlocal.communicator import SingleProcess


class Scripted(OverlapTrial):
    """A trial with τ = 2 whose steps take given seconds, of computing and of the update."""

    def __init__(self, steps):
        self.steps = iter(steps)
        self.together = []
        self._bench = SimpleNamespace(
            session=SimpleNamespace(communicator=SingleProcess()), begin_together=lambda: self.together.append(1)
        )
        self._overlap = 2
        self._samples = []

    def _train(self, before_update=lambda: None):
        before_update()
        return next(self.steps)


def test_a_round_is_two_steps_alone_one_that_begins_an_average_and_two_beside_it():
    """Alone 2 · (10 + 1), beside (11 + 1) + (12 + 3); own work 5 − 1."""
    trial = Scripted([(10, 1), (10, 1), (10, 5), (11, 1), (12, 3)])
    trial.trial()
    found = trial.take()
    assert (found.overlap, found.beyond.mean, found.own_work.mean) == (2, pytest.approx(5), pytest.approx(4))
    assert trial.together == [1], "all ranks begin the average at the same time"
    assert next(trial.steps, None) is None
    assert trial._samples == []
