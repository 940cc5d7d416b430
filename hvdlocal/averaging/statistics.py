"""Gradient statistics from what the workers send, and their moving averages. Arithmetic on numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

MIN_GRAD_VAR = 1e-6
"""FairScale's floor for σ², which the paper follows."""


def gradient_statistics(mean_sqr_norm: float, sqr_norm_of_mean: float, num_workers: int) -> tuple[float, float]:
    """Unbiased estimates of G = ‖∇f‖² and of one gradient's variance σ² (Eq. 15), from K gradients at the same weights.

    σ² = K/(K−1) · ( (1/K) Σ_k ‖g_k‖² − ‖ḡ‖² ),  G = ‖ḡ‖² − σ²/K

    Args:
        mean_sqr_norm: (1/K) Σ_k ‖g_k‖².
        sqr_norm_of_mean: ‖ḡ‖², ḡ = (1/K) Σ_k g_k.
        num_workers: K ≥ 2, the number of gradients (with accumulation, workers × micro-batches).

    Returns:
        (grad_sqr, grad_var), not clamped: either may be negative.

    Raises:
        ValueError: one gradient has no variance.
    """
    if num_workers < 2:
        raise ValueError(f"num_workers={num_workers}: the variance needs at least two gradients")
    grad_var = num_workers / (num_workers - 1) * (mean_sqr_norm - sqr_norm_of_mean)
    return sqr_norm_of_mean - grad_var / num_workers, grad_var


def default_smoothing(micro_batches: int) -> float:
    """FairScale's θ = max(1 − M/1000, 0) for M micro-batches of all workers between two estimates (at least one)."""
    return max(1 - max(micro_batches, 1) / 1000, 0.0)


@dataclass
class MovingAverage:
    """A debiased exponential moving average: b ← θ b + (1−θ) x, u ← θ u + (1−θ), value b/u."""

    weighted: float = 0.0
    weight: float = 0.0

    def update(self, x: float, theta: float) -> None:
        """Takes in `x`, keeping the share `theta` of what was there."""
        self.weighted = theta * self.weighted + (1 - theta) * x
        self.weight = theta * self.weight + (1 - theta)

    def weigh(self, weight: float) -> None:
        """Gives what there is another weight; the value stays."""
        self.weighted *= weight / self.weight
        self.weight = weight

    @property
    def value(self) -> float | None:
        """The average; None before the first update."""
        return self.weighted / self.weight if self.weight else None


class SmoothedStatistics:
    """Moving averages of G and σ², in FairScale's order: clamp each estimate, then average it (never the gain)."""

    def __init__(self) -> None:
        self._grad_sqr = MovingAverage()
        self._grad_var = MovingAverage()

    def update(self, grad_sqr: float, grad_var: float, theta: float) -> None:
        """Takes in one unclamped estimate."""
        self._grad_sqr.update(max(grad_sqr, 0.0), theta)
        self._grad_var.update(max(grad_var, MIN_GRAD_VAR), theta)

    def weigh_first(self, theta: float) -> None:
        """Gives the only estimate so far the weight that `theta` stands for."""
        self._grad_sqr.weigh(1 - theta)
        self._grad_var.weigh(1 - theta)

    @property
    def grad_sqr(self) -> float | None:
        """G ≥ 0; None before the first estimate."""
        return self._grad_sqr.value

    @property
    def grad_var(self) -> float | None:
        """σ² > 0; None before the first estimate."""
        return self._grad_var.value

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Plain numbers."""
        return {"grad_sqr": asdict(self._grad_sqr), "grad_var": asdict(self._grad_var)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """The reverse of `state_dict`."""
        self._grad_sqr = MovingAverage(**state["grad_sqr"])
        self._grad_var = MovingAverage(**state["grad_var"])
