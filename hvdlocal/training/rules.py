"""Builds the rules for the period and the gain that a configuration names. Numbers only; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from hvdlocal.averaging import (
    QSR,
    AdaComm,
    AdaScale,
    ConstantPeriod,
    LinearScaling,
    LocalAdaScale,
    NoScaling,
    PeriodRule,
    PostLocal,
    PowerRule,
    Scaling,
)
from hvdlocal.training.config import MethodConfig, PeriodConfig
from hvdlocal.training.settings import settings_of

RULE_SETTINGS = {name: found.needed_by for name, found in settings_of(PeriodConfig).items() if found.needed_by}
"""The settings of `method.period` that some rules need and the others refuse, each with the rules that need it."""


def build_scaling(method: MethodConfig) -> Scaling:
    """Returns the preset's rule for the gain."""
    if method.preset in ("acc-lin", "local-lin"):
        return LinearScaling(method.linear_warmup)
    if not method.is_adaptive:
        return NoScaling()
    if method.preset == "acc-ada":
        return AdaScale(method.smoothing)
    return LocalAdaScale(
        c=method.c,
        stale=method.preset != "local-ada-nostale",
        statistics=method.statistics,
        sketch_size=method.sketch_size,
        smoothing=method.smoothing,
    )


def micro_batches_per_step(method: MethodConfig) -> int:
    """Returns the micro-batches of one optimizer step.

    With acc-lin and acc-ada they are the period, so that K and H mean the same for every method (Balles et al., Alg. 2).

    Raises:
        ValueError: such a preset is combined with another rule than constant, or with `accumulate`.
    """
    if method.accumulates:
        if method.accumulate != 1 or method.period.rule != "constant":
            raise ValueError(
                f"method.preset={method.preset} accumulates method.period.period micro-batches per step: use rule constant and "
                "leave method.accumulate at 1"
            )
        return method.period.period
    return method.accumulate


def island_size(island: Literal["node"] | int, ranks_per_node: int | None) -> int:
    """Returns n, the ranks that are one worker: K of the formulas is the number of such islands, and a step of one stands for n
    times the micro-batches of a rank.

    Args:
        island: as `method.island` has it.
        ranks_per_node: None if it is not known.

    Raises:
        ValueError: the ranks of a node are not known and needed, or do not make whole islands.
    """
    if island == "node":
        if ranks_per_node is None:
            raise ValueError(
                "island=node: the number of ranks on a node is not known; hvdlocal plan takes it as --ranks-per-node"
            )
        return ranks_per_node
    if ranks_per_node is not None and ranks_per_node % island and island % ranks_per_node:
        raise ValueError(
            f"island={island}: with {ranks_per_node} ranks on a node, an island would hold a part of one; choose node, a number "
            f"that divides {ranks_per_node}, or a multiple of it"
        )
    return island


def count_workers(ranks: int, island: Literal["node"] | int, ranks_per_node: int | None) -> int:
    """Returns K, the number of islands.

    Args:
        ranks: of the job.
        island: as `method.island` has it.
        ranks_per_node: None if it is not known.

    Raises:
        ValueError: the ranks do not make whole islands, and what `island_size` raises.
    """
    size = island_size(island, ranks_per_node)
    if ranks % size:
        raise ValueError(f"islands of {size} ranks need a multiple of {size} ranks, not {ranks}")
    return ranks // size


def build_period(config: PeriodConfig, peak_lr: float, warmup: float, epoch: float) -> PeriodRule:
    """Returns the rule for H.

    Args:
        config: the rule and its settings.
        peak_lr: base learning rate at the end of the warm-up.
        warmup: progress at which the warm-up ends.
        epoch: progress of one scale-invariant epoch.

    Raises:
        ValueError: a setting that the rule needs is missing, or one that it refuses is given.
    """
    for name, rules in RULE_SETTINGS.items():
        value = getattr(config, name)
        if config.rule in rules and value is None:
            raise ValueError(f"method.period.rule={config.rule} needs method.period.{name}")
        if config.rule not in rules and value is not None:
            raise ValueError(f"method.period.{name}={value} has no meaning for rule {config.rule}: leave it out")
    if config.rule == "constant":
        return ConstantPeriod(config.period, max_period=config.max_period)
    if config.rule == "adacomm":
        return AdaComm(config.period, max_period=config.max_period)
    if config.rule == "post-local":
        assert config.switch_epochs is not None
        return PostLocal(config.switch_epochs * epoch, config.period, max_period=config.max_period)
    assert config.alpha is not None
    assert config.h_base is not None
    warmup_lr = peak_lr if warmup else None
    if config.rule == "qsr":
        return QSR(config.alpha, config.h_base, warmup=warmup, warmup_lr=warmup_lr, max_period=config.max_period)
    assert config.exponent is not None
    return PowerRule(
        config.alpha, config.h_base, config.exponent, warmup=warmup, warmup_lr=warmup_lr, max_period=config.max_period
    )


def describe_method(method: MethodConfig) -> str:
    """Returns the method in a few words: "local qsr alpha=0.2 h_base=4", "acc-ada 8 micro-batches"."""
    period = method.period
    words: list[str] = [method.preset]
    if method.is_local:
        rule = [f"{name}={getattr(period, name):g}" for name in RULE_SETTINGS if getattr(period, name) is not None]
        own = [f"H={period.period}"] if period.rule in ("constant", "post-local") else []
        cap = [f"max_period={period.max_period}"] if period.max_period else []
        words += [period.rule, *own, *rule, *cap]
    elif method.preset != "sync":
        words.append(f"{period.period} micro-batches")
    if method.island != 1:
        words.append(f"island={method.island}")
    if method.island_period > 1:
        words.append(f"island_period={method.island_period}")
    if method.is_local:
        words += _what_becomes_of_the_mean(method)
    return " ".join(words)


def _what_becomes_of_the_mean(method: MethodConfig) -> Iterator[str]:
    """Yields the settings that differ from plain averaging, or from the preset."""
    for name, value in vars(method.outer).items():
        if value is not None and method.outer_optimizer != "none":
            yield f"outer.{name}={str(value).lower() if isinstance(value, bool) else value}"
    if method.overlap:
        yield f"overlap={method.overlap}"
    if method.mixing is not None:
        yield f"mixing={method.mixing:g}"
    if method.moment_periods:
        periods = ", ".join(f"{name}: {period}" for name, period in method.moment_periods.items())
        yield f"momentum={{{periods}}}"
