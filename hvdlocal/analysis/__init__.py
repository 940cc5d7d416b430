"""What a schedule costs, as arithmetic."""

from hvdlocal.analysis.cost import pseudo_wall_clock
from hvdlocal.analysis.rounds import Round, plan_rounds

__all__ = ["Round", "plan_rounds", "pseudo_wall_clock"]
