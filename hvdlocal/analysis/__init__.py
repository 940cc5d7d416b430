"""What a schedule costs, as arithmetic."""

from hvdlocal.analysis.cost import pseudo_wall_clock
from hvdlocal.analysis.rounds import Round, plan_rounds
from hvdlocal.analysis.scaling import (
    Link,
    allreduce_seconds,
    doubling_seconds,
    halving_seconds,
    ring_seconds,
    straggler_factor,
)

__all__ = [
    "Link",
    "Round",
    "allreduce_seconds",
    "doubling_seconds",
    "halving_seconds",
    "plan_rounds",
    "pseudo_wall_clock",
    "ring_seconds",
    "straggler_factor",
]
