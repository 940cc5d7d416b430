"""A plan together with what follows from additional numbers: bytes, seconds, checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hvdlocal.figures.units import seconds_text
from hvdlocal.plan.averaging_time import AveragingTime
from hvdlocal.plan.run_plan import RunPlan
from hvdlocal.training.checkpoint.interval import young_interval

if TYPE_CHECKING:
    from hvdlocal.plan.payload import Payload


@dataclass(frozen=True)
class Checkpoints:
    """The best interval between checkpoints, and its cost.

    Attributes:
        seconds: time between two checkpoints, Young's √(2 · cost · time between failures).
        lost_share: share of the run's time that is spent on checkpoints and, on average, on work that a failure undoes.
    """

    seconds: float
    lost_share: float

    @classmethod
    def best(cls, cost_seconds: float, failure_hours: float) -> Checkpoints:
        """Returns the interval that loses the least time (Young 1974, Eq. 1; the first-order result of Daly 2006).

        Args:
            cost_seconds: time by which one checkpoint delays training.
            failure_hours: mean time between failures of the whole job.

        Raises:
            ValueError: an argument is not positive.
        """
        if not (cost_seconds > 0 and failure_hours > 0):
            raise ValueError(
                f"a checkpoint's {cost_seconds} seconds and the {failure_hours} hours between failures must be positive"
            )
        seconds = young_interval(cost_seconds, 3600 * failure_hours)
        return cls(seconds, cost_seconds / seconds + seconds / (2 * 3600 * failure_hours))


@dataclass(frozen=True)
class Forecast:
    """One line of a comparison.

    Attributes:
        label: what distinguishes this line from the others.
        plan: the run.
        payload: bytes of the run's collectives; None if they were not asked for.
        step_seconds: time of one optimizer step without communication; None if it is not known.
        averaging: None if the time of an averaging is not known.
        checkpoints: None if the cost of a checkpoint is not known.
        notes: assumptions and remarks, as sentences.
    """

    label: str
    plan: RunPlan
    payload: Payload | None = None
    step_seconds: float | None = None
    averaging: AveragingTime | None = None
    checkpoints: Checkpoints | None = None
    notes: tuple[str, ...] = ()

    @property
    def legend(self) -> str:
        """The label, with the exposed time of averaging if it is known."""
        if self.averaging is None:
            return self.label
        return f"{self.label}: {seconds_text(self.averaging.exposed)} of averaging exposed"

    @property
    def island_bytes(self) -> int | None:
        """Bytes that one rank sends in training inside its island; 0 without islands."""
        if self.payload is None:
            return None
        return self.plan.island_exchanges * self.payload.island_step + self.payload.at_round_ends(self.plan.rounds)

    @property
    def bytes(self) -> int | None:
        """Bytes that one rank sends in training between the workers, without evaluations."""
        if self.payload is None:
            return None
        return self.payload.between(self.plan.rounds) if self.plan.ranks > 1 else 0

    @property
    def bytes_per_round(self) -> float | None:
        """Mean bytes of a round, or of a step of the synchronous presets; None if they were not asked for."""
        if self.payload is None:
            return None
        return self.payload.between(self.plan.rounds) / self.plan.rounds if self.payload.later else self.payload.round

    @property
    def data_parallel_bytes(self) -> int | None:
        """Bytes of data parallelism for the same work: the gradient of every micro-batch."""
        if self.payload is None:
            return None
        return self.plan.micro_batches * self.payload.gradient if self.plan.ranks > 1 else 0

    @property
    def byte_share(self) -> float | None:
        """`bytes` divided by `data_parallel_bytes`; None if either is not known, or for a single worker."""
        return self.bytes / self.data_parallel_bytes if self.bytes and self.data_parallel_bytes else None

    def seconds(self, steps: float) -> float | None:
        """Returns the time of this number of steps without communication; None if it is not known."""
        return None if self.step_seconds is None else steps * self.step_seconds

    def as_dict(self) -> dict[str, Any]:
        """Returns everything, for JSON."""
        plan, longest = self.plan, self.plan.longest
        return {
            "label": self.label,
            "ranks": plan.ranks,
            "workers": plan.num_workers,
            "island_size": plan.island_size,
            "accumulate": plan.accumulate,
            "steps": plan.steps,
            "rounds": plan.rounds,
            "epochs": plan.epochs,
            "data_epochs": plan.data_epochs,
            "mean_gain": plan.mean_gain,
            "mean_period": plan.mean_period,
            "longest": {
                "steps": longest.period,
                "from_step": longest.step,
                "from_epoch": longest.epoch,
                "data_epochs": longest.period * plan.data_epochs_per_step,
                "seconds": self.seconds(longest.period),
            },
            "collectives": plan.collectives,
            "collective_share": plan.collective_share,
            "parameters": self.payload and self.payload.parameters,
            "bytes_per_round": self.bytes_per_round,
            "bytes": self.bytes,
            "island_bytes": self.island_bytes,
            "data_parallel_bytes": self.data_parallel_bytes,
            "byte_share": self.byte_share,
            "memory": asdict(self.payload.memory) if self.payload and self.payload.memory else None,
            "computing_seconds": self.seconds(plan.steps),
            "averaging_seconds": self.averaging and self.averaging.each,
            "exposed_seconds": self.averaging and self.averaging.exposed,
            "hidden_seconds": self.averaging and self.averaging.hidden,
            "exposed_seconds_per_round": self.averaging and self.averaging.exposed / plan.rounds,
            "free_from_overlap": self.averaging and self.averaging.free_from,
            "checkpoint_seconds": self.checkpoints and self.checkpoints.seconds,
            "notes": list(self.notes),
            "stretches": [phase._asdict() for phase in plan.phases],
        }
