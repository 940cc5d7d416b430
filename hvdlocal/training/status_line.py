"""The state of a run in one line: all of it in a log, and on a terminal as much as fits."""

from __future__ import annotations

from dataclasses import dataclass

from hvdlocal.figures.units import bytes_text, metric_text, remaining_text


@dataclass(frozen=True)
class Status:
    """The state of a run at a step.

    Attributes:
        epoch, epochs: position and budget in scale-invariant epochs.
        loss: training loss; None before the first.
        base_lr: γ, the learning rate of the schedule.
        gain: ρ, by which it is multiplied.
        period: H.
        ranks: their number.
        samples_per_second: of rank 0; None before the first interval of the log.
        remaining_seconds: estimated time to the end; None before it is known.
        peak_memory_bytes: the most memory that rank 0 has taken, on its GPU if it has one; None if it is not known yet.
    """

    epoch: float
    epochs: float
    loss: float | None
    base_lr: float
    gain: float
    period: int
    ranks: int = 1
    samples_per_second: float | None = None
    remaining_seconds: float | None = None
    peak_memory_bytes: int | None = None

    @property
    def position(self) -> str:
        """The position in the budget: epoch 12.10 of 24."""
        return f"epoch {self.epoch:.2f} of {self.epochs:g}"

    def log_line(self) -> str:
        """Returns the whole state."""
        return "  ".join([self.position, *(text for _, text in self._fields(long=True))])

    def fitted(self, width: int) -> str:
        """Returns as much of the state as fits, the most important fields in any case.

        Args:
            width: columns of the terminal that are free.
        """
        position = f"{self.epoch:.1f}/{self.epochs:g} epochs"
        fields = self._fields(long=False)
        while len(fields) > 2 and len("  ".join([position, *(text for _, text in fields)])) > width:
            fields.remove(max(fields))
        return "  ".join([position, *(text for _, text in fields)])

    def _fields(self, *, long: bool) -> list[tuple[int, str]]:
        """Returns the fields in the order in which they are shown, each with its rank in importance, from 0."""
        lr = self.base_lr * self.gain
        fields = []
        if self.loss is not None:
            fields.append((3, f"loss {metric_text(self.loss)}"))
        if long:
            fields.append((5, f"lr {lr:.4g} = {self.base_lr:.4g}×{self.gain:.2f}"))
        else:
            fields += [(0, f"gain {self.gain:.2f}"), (5, f"lr {lr:.3g}")]
        fields.append((1, f"H {self.period}"))
        if self.samples_per_second is not None:
            everywhere = self.ranks * self.samples_per_second
            each = f" ({self.samples_per_second:,.0f} per rank)" if long and self.ranks > 1 else ""
            fields.append((4, f"{everywhere:,.0f} samples/s{each}" if long else f"{everywhere:,.0f}/s"))
        if self.peak_memory_bytes is not None:
            fields.append((6, f"memory {bytes_text(self.peak_memory_bytes)}"))
        if self.remaining_seconds is not None:
            fields.append((2, f"{remaining_text(self.remaining_seconds)} left"))
        return fields
