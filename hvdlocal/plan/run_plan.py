"""Plans what a configured run will do and cost, from the trainer's own rules and without torch."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from hvdlocal.averaging.gain import Scaling, ScalingContext
from hvdlocal.averaging.rounds import Round, plan_rounds, plan_steps
from hvdlocal.data.load.partition import Partition
from hvdlocal.training.config import TrainConfig
from hvdlocal.training.config_checks import check_ranges
from hvdlocal.training.rules import build_period, build_scaling, island_size, micro_batches_per_step
from hvdlocal.training.run_length import run_length
from hvdlocal.training.schedules import Schedule

if TYPE_CHECKING:
    from hvdlocal.data.read.dataset import StoredSamples


class Phase(NamedTuple):
    """Consecutive rounds of one length.

    Attributes:
        step: the optimizer step at which the first round begins, from 0.
        epoch: the same in scale-invariant epochs.
        end: the end of the last round, in scale-invariant epochs.
        period: H.
        rounds: number of rounds.
        lr: γ, the base learning rate at the beginning.
        gain: mean of ρ over the steps.
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
    """The plan of a run. Counts are those of one rank.

    Attributes:
        num_workers: K, islands or ranks.
        island_size: n, the ranks of a worker.
        island_period: steps between two averages of the parameters inside an island; 1 for gradients at every step.
        accumulate: a, micro-batches of a rank per optimizer step.
        steps: optimizer steps.
        rounds: averagings; for the synchronous presets, steps.
        phases: all rounds in order.
        epochs: scale-invariant epochs at the end of the run.
        data_epochs: passes over the data.
        mean_gain: mean ρ over the steps.
        collectives: number of collectives of training between the workers; 0 on one rank.
        schedule: γ as a function of scale-invariant epochs.
        overlap: τ.
        overlapped: number of averages by the steps of the next round during which they are under way. The last one, and each one
            before an evaluation, is waited for at once.
    """

    num_workers: int
    island_size: int
    island_period: int
    accumulate: int
    steps: int
    rounds: int
    phases: tuple[Phase, ...]
    epochs: float
    data_epochs: float
    mean_gain: float
    collectives: int
    schedule: Schedule
    overlap: int
    overlapped: Mapping[int, int]

    @property
    def ranks(self) -> int:
        """The processes of the run."""
        return self.num_workers * self.island_size

    @property
    def micro_batches(self) -> int:
        """Number of forward and backward passes, which is the number of collectives that data parallelism would need."""
        return self.steps * self.accumulate

    @property
    def collective_share(self) -> float:
        """Collectives relative to data parallelism, which averages the gradient of every micro-batch."""
        return self.collectives / self.micro_batches

    @property
    def longest(self) -> Phase:
        """The first of the longest rounds."""
        return max(self.phases, key=lambda phase: phase.period)

    @property
    def mean_period(self) -> float:
        """Mean H over the rounds."""
        return self.steps / self.rounds

    @property
    def data_epochs_per_step(self) -> float:
        """Epochs of data that one optimizer step of all ranks consumes."""
        return self.data_epochs / self.steps

    @property
    def island_exchanges(self) -> int:
        """How often the islands average inside before a round ends, in the whole run; 0 without islands.

        The average at the end of a round takes the place of one of parameters inside, but with overlap: what the island's ranks
        send in common is then what each of them has.
        """
        if self.island_size == 1:
            return 0
        if self.island_period == 1:
            return self.steps
        inside = sum(phase.rounds * ((phase.period - 1) // self.island_period) for phase in self.phases)
        return inside + (self.rounds - 1 if self.overlap else 0)

    def phase_at(self, epoch: float) -> Phase:
        """Returns the phase at a scale-invariant epoch ≥ 0."""
        return self.phases[bisect_right(self.phases, epoch, key=lambda phase: phase.epoch) - 1]


@dataclass(frozen=True)
class AssumedGain(Scaling):
    """Assumes a constant gain from the first estimate on, since only a run can measure the gain."""

    assumed: float = 1.0
    progress_varies = False

    def __post_init__(self) -> None:
        if not self.assumed > 0:
            raise ValueError(f"the assumed gain must be positive, not {self.assumed}")

    def gain(self, now: ScalingContext) -> float:
        return 1.0 if now.grad_sqr is None else self.assumed


def adapts(config: TrainConfig) -> bool:
    """Returns whether the gain comes from gradient statistics, so that a plan must assume something."""
    return build_scaling(config.method).uses_statistics


def plan_run(
    config: TrainConfig,
    samples: int,
    num_workers: int,
    *,
    gain: float | None = None,
    grad_var_over_sqr: float | None = None,
    ranks_per_node: int | None = None,
) -> RunPlan:
    """Plans a run with the trainer's schedule, rules and counting.

    Args:
        config: the configuration of the run; its data and its output are not read.
        samples: N, the number of training samples.
        num_workers: K, islands or ranks.
        gain: the assumed ρ if it comes from gradient statistics; by default 1.
        grad_var_over_sqr: alternatively the assumed σ²/G, from which the gain follows for each H (Balles et al., Eq. 49).
        ranks_per_node: needed if `method.island` is "node".

    Raises:
        ValueError: the run could not start, the period depends on the loss, or an assumption has no effect or no meaning.
    """
    check_ranges(config)
    method, accumulate = config.method, micro_batches_per_step(config.method)
    size = island_size(method.island, ranks_per_node)
    ranks = num_workers * size
    steps_per_epoch = _steps_per_epoch(config, samples, ranks)
    scaling, statistics = _assumptions(config, build_scaling(method), gain, grad_var_over_sqr)
    if ranks * (1 if method.is_local else accumulate) == 1:
        statistics = None  # a single gradient has no variance

    length = run_length(config, steps_per_epoch, ranks)
    epoch, budget, schedule = length.epoch, length.budget, length.schedule
    if method.is_local:
        warmup = config.schedule.warmup_epochs * epoch
        planned = plan_rounds(
            build_period(method.period, config.optimizer.lr, warmup, epoch),
            schedule,
            budget,
            scaling,
            num_workers=num_workers,
            accumulate=size * accumulate,
            statistics=statistics,
            stale=method.preset != "local-ada-nostale",
            rate=method.period.rate,
            overlap=method.overlap,
            evaluate_every=config.evaluate_every_epochs * epoch,
        )
        rounds = list(planned)
        phases = tuple(_phases(rounds, schedule, epoch))
        overlapped = Counter(one.overlapped for one in rounds)
    else:
        steps, end = plan_steps(budget, scaling, num_workers=num_workers, accumulate=accumulate, statistics=statistics)
        phases = (Phase(0, 0.0, end / epoch, 1, steps, schedule(0), end / steps),)
        overlapped = Counter({0: steps})
    steps = sum(phase.period * phase.rounds for phase in phases)
    averagings = sum(phase.rounds for phase in phases)
    # Statistics that are not stale are summed over all ranks, also those of one island.
    per_round = (num_workers > 1) + (ranks > 1 and method.preset == "local-ada-nostale")
    return RunPlan(
        num_workers=num_workers,
        island_size=size,
        island_period=method.island_period,
        accumulate=accumulate,
        steps=steps,
        rounds=averagings,
        phases=phases,
        epochs=phases[-1].end,
        data_epochs=steps * accumulate / steps_per_epoch,
        mean_gain=phases[-1].end * epoch / steps,
        collectives=averagings * per_round,
        schedule=lambda epochs: schedule(epochs * epoch),
        overlap=method.overlap,
        overlapped=overlapped,
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


def _phases(rounds: Iterable[Round], schedule: Schedule, epoch: float) -> Iterator[Phase]:
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
    """The part of a data set that is needed to count batches."""

    count: int
    fingerprint: str = ""
    chosen: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.count


def _steps_per_epoch(config: TrainConfig, samples: int, num_workers: int) -> float:
    data = config.data
    if samples < 1:
        raise ValueError(f"{samples} training samples: at least 1")
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
