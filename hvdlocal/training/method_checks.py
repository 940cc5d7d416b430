"""Which combinations of a method's settings have no meaning, and why."""

from __future__ import annotations

from hvdlocal.averaging.moment_periods import check_moment_periods
from hvdlocal.training.config import OUTER_OF_PRESET, MethodConfig

BUFFER_POLICIES = ("average", "local", "reestimate")


def check_method(method: MethodConfig) -> None:
    """Refuses what no run can mean.

    Raises:
        ValueError: naming the settings, their values and the remedy.
    """
    if not set(method.buffer_policies) <= set(BUFFER_POLICIES):
        remedy = f"choose one of {', '.join(BUFFER_POLICIES)}, or a mapping of names to these"
        raise ValueError(f"method.buffers={method.buffers}: {remedy}")
    _check_moment_periods(method)
    _check_islands(method)
    _check_outer(method)
    _check_overlap(method)


def _check_moment_periods(method: MethodConfig) -> None:
    periods = method.moment_periods
    given = f"method.momentum={periods}"
    if not isinstance(method.momentum, str) and not periods:
        raise ValueError(f"{given}: name at least one moment, as in {{exp_avg: 3}}, or choose local")
    for name in periods:
        if not str(name).isidentifier():
            raise ValueError(f"{given}: {name!r} is no name of a moment, as exp_avg is")
    check_moment_periods(periods, "method.momentum")


def _check_islands(method: MethodConfig) -> None:
    if method.island != 1 and not method.is_local:
        raise ValueError(
            f"method.island={method.island} with method.preset={method.preset}: data parallelism averages the gradients of all "
            "ranks, so it has no islands; leave method.island at 1, or choose a local preset"
        )
    if method.island_period == 1:
        return
    given = f"method.island_period={method.island_period}"
    if method.island == 1:
        raise ValueError(
            f"{given} without islands: set method.island to node or to a number of ranks, or leave it at 1"
        )
    if method.is_adaptive:
        raise ValueError(
            f"{given} with method.preset={method.preset}: no gain is derived for ranks that take steps of their own inside an "
            "island; choose local or local-lin, or leave it at 1"
        )


def _check_outer(method: MethodConfig) -> None:
    chosen = method.outer.name
    if chosen is None:
        return
    given = f"method.outer.name={chosen} with method.preset={method.preset}"
    own = OUTER_OF_PRESET.get(method.preset)
    if own is not None and chosen != own:
        raise ValueError(f"{given}: {method.preset} is local steps with the outer optimizer {own}; choose preset local")
    if chosen != "none" and not method.is_local:
        raise ValueError(
            f"{given}: data parallelism averages gradients, so there is no mean of replicas for an outer optimizer to step on; "
            "leave method.outer.name out, or choose a local preset"
        )


def _check_overlap(method: MethodConfig) -> None:
    if method.mixing is not None and not method.overlap:
        raise ValueError(
            f"method.mixing={method.mixing} without overlap: an average that is applied at once leaves no local steps to mix it "
            "with; set method.overlap, or leave method.mixing out"
        )
    if not method.overlap:
        return
    given = f"method.overlap={method.overlap} with method.preset={method.preset}"
    if not method.is_local:
        raise ValueError(
            f"{given}: data parallelism needs the mean gradient before it can step; leave method.overlap at 0, or choose a "
            "local preset"
        )
    if method.preset == "local-ada-nostale":
        raise ValueError(
            f"{given}: the gain of a round would come from gradients at its first step, where an average is still under way; "
            "choose local-ada, or leave method.overlap at 0"
        )
