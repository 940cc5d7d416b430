"""Times steps beside which an average is under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hvdlocal.advise.benchmark import Benchmark
from hvdlocal.advise.measurements import OverlapTimes, SampleSummary
from hvdlocal.advise.ranks import slowest_rank
from hvdlocal.training.step import TrainingStep


class OverlapTrial:
    """Rounds of Local SGD with overlap, on real batches, with a replica of its own. Building it and a trial are collectives.

    A round has 2τ + 1 steps: τ beside the average of the round before, τ alone, and one that begins the next average. A trial
    begins with those alone, so that no average is under way between two trials.

    Args:
        bench: the shared parts; of two ranks or more.
        overlap: τ, at least 1.
    """

    def __init__(self, bench: Benchmark, overlap: int) -> None:
        self._bench = bench
        self._overlap = overlap
        method = bench.method("local", 2 * overlap + 1, overlap=overlap)
        # Mixing takes as long as carrying steps over, and every optimizer's moments allow it.
        self._optimizer = bench.optimizer(replace(method, mixing=0.5), endless=True)
        self._step = TrainingStep(bench.session, self._optimizer, lambda progress: 0.0)
        self._samples: list[tuple[float, float, float]] = []
        self._optimizer.model.train()
        for _ in range(overlap):
            self._train()

    def trial(self) -> None:
        """Times the steps of one round."""
        alone = [self._train() for _ in range(self._overlap)]
        _, begun = self._train(self._bench.begin_together)
        beside = [self._train() for _ in range(self._overlap)]
        update = sum(seconds for _, seconds in alone) / self._overlap
        self._samples.append((sum(map(sum, beside)), sum(map(sum, alone)), begun - update))

    def take(self) -> OverlapTimes:
        """Returns the measurements since the last call."""
        beside, alone, own_work = slowest_rank(self._bench.session.communicator, self._samples)
        self._samples = []
        beyond = [together - apart for together, apart in zip(beside, alone, strict=True)]
        return OverlapTimes(self._overlap, SampleSummary.of(beyond), SampleSummary.of(own_work))

    def _train(self, before_update: Callable[[], None] = lambda: None) -> tuple[float, float]:
        """Takes a step; returns the seconds of computing its gradient, and of the update with what belongs to an averaging."""
        bench, computing = self._bench, 0.0
        for _ in range(self._optimizer.accumulate - 1):
            computing += bench.seconds(self._compute) + bench.seconds(self._step.update)
        computing += bench.seconds(self._compute)
        before_update()
        return computing, bench.seconds(self._step.update)

    def _compute(self) -> None:
        self._step.compute(next(self._bench.batches))
