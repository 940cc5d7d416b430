"""How long a run is: epochs and budgets in units of progress. Numbers only; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from hvdlocal.training.config import TrainConfig
from hvdlocal.training.rules import build_scaling, micro_batches_per_step
from hvdlocal.training.schedules import Schedule, build_schedule


@dataclass(frozen=True)
class RunLength:
    """How far a run goes. Progress counts scale-invariant iterations, which are steps at gain 1.

    Attributes:
        epoch: progress of one scale-invariant epoch.
        budget: S, the progress at which the run ends.
        schedule: γ, the base learning rate, as a function of progress.
        reference_batches: micro-batches of the step that the base learning rate was tuned for, which is a unit of progress.
    """

    epoch: float
    budget: float
    schedule: Schedule
    reference_batches: int


def run_length(config: TrainConfig, steps_per_epoch: float, ranks: int) -> RunLength:
    """The length of a configured run.

    Args:
        config: epochs, schedule, base learning rate and method.
        steps_per_epoch: batches that one rank takes in a pass over the data.
        ranks: of the job. Islands of them change nothing here: n times fewer workers take n times the micro-batches.

    Raises:
        ValueError: settings of the method or of the schedule contradict each other.
    """
    accumulate = micro_batches_per_step(config.method)
    reference = build_scaling(config.method).reference_batches(ranks, accumulate)
    epoch = steps_per_epoch * ranks / reference
    budget = config.epochs * epoch
    return RunLength(epoch, budget, build_schedule(config.schedule, config.optimizer.lr, budget, epoch), reference)
