"""What a configured run will do and cost, before it is started. Built from the trainer's own rules; needs no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple, cast

from hvdlocal.averaging.gain import Scaling, ScalingContext
from hvdlocal.averaging.rounds import Round, plan_rounds, plan_steps
from hvdlocal.data.load.partition import Partition
from hvdlocal.training.config import TrainConfig
from hvdlocal.training.config_checks import check_ranges
from hvdlocal.training.rules import build_period, build_scaling, micro_batches_per_step
from hvdlocal.training.run_length import run_length
from hvdlocal.training.schedules import Schedule

if TYPE_CHECKING:
    from hvdlocal.data.read.dataset import StoredSamples


class Phase(NamedTuple):
    """Consecutive rounds of one length.

    Attributes:
        step: the optimizer step at which the first begins, from 0.
        epoch: the same in scale-invariant epochs.
        end: where the last one ends, in scale-invariant epochs.
        period: H.
        rounds: how many.
        lr: γ, the base learning rate at the beginning.
        gain: ρ, the mean over its steps.
    """

    step: int
    epoch: float
    end: float
    period: int
    rounds: int
    lr: float
    gain: float


@dataclass(frozen=True)
class RunPlan:
    """A run before it is started. Counts are those of one rank.

    Attributes:
        num_workers: K.
        accumulate: a, micro-batches per optimizer step.
        steps: optimizer steps.
        rounds: averagings; for the synchronous presets, steps.
        stretches: all rounds in order.
        epochs: scale-invariant epochs at its end.
        data_epochs: passes over the data.
        mean_gain: mean ρ over the steps.
        collectives: of training; none on one rank.
        schedule: γ as a function of scale-invariant epochs.
    """

    num_workers: int
    accumulate: int
    steps: int
    rounds: int
    stretches: tuple[Phase, ...]
    epochs: float
    data_epochs: float
    mean_gain: float
    collectives: int
    schedule: Schedule

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes, and so many collectives of data parallelism at the same work."""
        return self.steps * self.accumulate

    @property
    def collective_share(self) -> float:
        """Collectives over those of data parallelism, which averages the gradient of every micro-batch."""
        return self.collectives / self.micro_batches

    @property
    def longest(self) -> Phase:
        """The first of the longest rounds."""
        return max(self.stretches, key=lambda stretch: stretch.period)

    @property
    def mean_period(self) -> float:
        """Mean H over the rounds."""
        return self.steps / self.rounds

    @property
    def data_epochs_per_step(self) -> float:
        """What one optimizer step of all ranks consumes."""
        return self.data_epochs / self.steps

    def stretch_at(self, epoch: float) -> Phase:
        """What is under way at a scale-invariant epoch ≥ 0."""
        return self.stretches[bisect_right(self.stretches, epoch, key=lambda stretch: stretch.epoch) - 1]


@dataclass(frozen=True)
class AssumedGain(Scaling):
    """In place of a gain that only a run can know: a constant, from the first estimate on."""

    assumed: float = 1.0
    progress_varies = False

    def __post_init__(self) -> None:
        if not self.assumed > 0:
            raise ValueError(f"the assumed gain must be positive, not {self.assumed}")

    def gain(self, now: ScalingContext) -> float:
        return 1.0 if now.grad_sqr is None else self.assumed


def adapts(config: TrainConfig) -> bool:
    """Whether the gain comes from gradient statistics, so that a plan must assume something."""
    return build_scaling(config.method).uses_statistics


def plan_run(
    config: TrainConfig,
    samples: int,
    num_workers: int,
    *,
    gain: float | None = None,
    grad_var_over_sqr: float | None = None,
) -> RunPlan:
    """The plan of a run, with the trainer's own schedule, rules and way of counting.

    Args:
        config: as for training; neither its data nor its output are looked at.
        samples: N, training images.
        num_workers: K.
        gain: ρ to assume when it comes from gradient statistics; by default 1.
        grad_var_over_sqr: or σ²/G to assume, from which the gain follows for each H (Balles et al., Eq. 49).

    Raises:
        ValueError: the run could not start, the period depends on the loss, or an assumption has no use or no meaning.
    """
    check_ranges(config)
    method, accumulate = config.method, micro_batches_per_step(config.method)
    local = method.is_local
    steps_per_epoch = _steps_per_epoch(config, samples, num_workers)
    scaling, statistics = _assumptions(config, build_scaling(method), gain, grad_var_over_sqr)
    if num_workers * (1 if local else accumulate) == 1:
        statistics = None  # one gradient has no variance

    length = run_length(config, steps_per_epoch, num_workers)
    epoch, budget, schedule = length.epoch, length.budget, length.schedule
    if local:
        warmup = config.schedule.warmup_epochs * epoch
        rounds = plan_rounds(
            build_period(method.period, config.optimizer.lr, warmup, epoch),
            schedule,
            budget,
            scaling,
            num_workers=num_workers,
            accumulate=accumulate,
            statistics=statistics,
            stale=method.preset != "local-ada-nostale",
            rate=method.period.rate,
        )
        stretches = tuple(_stretches(rounds, schedule, epoch))
    else:
        steps, end = plan_steps(budget, scaling, num_workers=num_workers, accumulate=accumulate, statistics=statistics)
        stretches = (Phase(0, 0.0, end / epoch, 1, steps, schedule(0), end / steps),)
    steps = sum(stretch.period * stretch.rounds for stretch in stretches)
    averagings = sum(stretch.rounds for stretch in stretches)
    per_round = 0 if num_workers == 1 else 2 if method.preset == "local-ada-nostale" else 1
    return RunPlan(
        num_workers=num_workers,
        accumulate=accumulate,
        steps=steps,
        rounds=averagings,
        stretches=stretches,
        epochs=stretches[-1].end,
        data_epochs=steps * accumulate / steps_per_epoch,
        mean_gain=stretches[-1].end * epoch / steps,
        collectives=averagings * per_round,
        schedule=lambda epochs: schedule(epochs * epoch),
    )


def _assumptions(
    config: TrainConfig, scaling: Scaling, gain: float | None, grad_var_over_sqr: float | None
) -> tuple[Scaling, tuple[float, float] | None]:
    if not scaling.uses_statistics:
        if gain is not None or grad_var_over_sqr is not None:
            raise ValueError(
                f"method.preset={config.method.preset} takes no gain from gradient statistics: there is nothing to assume"
            )
        return scaling, None
    if gain is not None and grad_var_over_sqr is not None:
        raise ValueError("assume a gain or σ²/G, not both: the one follows from the other")
    if grad_var_over_sqr is None:
        return AssumedGain(1.0 if gain is None else gain), (1.0, 0.0)
    if grad_var_over_sqr < 0:
        raise ValueError(f"σ²/G must not be negative, but is {grad_var_over_sqr}")
    return scaling, (1.0, grad_var_over_sqr)


def _stretches(rounds: Iterable[Round], schedule: Schedule, epoch: float) -> Iterator[Phase]:
    """Joins consecutive rounds of one length."""
    for period, group in groupby(rounds, key=lambda one: one.period):
        joined = list(group)
        first, last = joined[0], joined[-1]
        gain = (last.end - first.progress) / (period * len(joined))
        yield Phase(
            first.start, first.progress / epoch, last.end / epoch, period, len(joined), schedule(first.progress), gain
        )


@dataclass(frozen=True)
class _Samples:
    """As much of a data set as the counting of batches looks at."""

    count: int
    fingerprint: str = ""

    def __len__(self) -> int:
        return self.count


def _steps_per_epoch(config: TrainConfig, samples: int, num_workers: int) -> float:
    data = config.data
    if samples < 1:
        raise ValueError(f"{samples} training images: at least 1")
    plan = Partition(
        cast("StoredSamples", _Samples(samples)),
        data.batch_size,
        rank=0,
        num_workers=num_workers,
        seed=config.seed,
        order="global",
        tail=data.tail,
    )
    return plan.steps_per_epoch
