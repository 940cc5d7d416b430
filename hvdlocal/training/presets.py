"""Builds rules and optimizers from a configuration. Rules alone need no torch, which is imported where it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard, cast

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
from hvdlocal.training.config import MethodConfig, OptimizerConfig, PeriodConfig, TrainConfig
from hvdlocal.training.settings import settings_of

if TYPE_CHECKING:
    import torch

    from hvdlocal.averaging import LocalOptimizer, SynchronousOptimizer
    from hvdlocal.averaging.buffers import Buffers
    from hvdlocal.communicator import Communicator
    from hvdlocal.training.run_length import RunLength

RULE_SETTINGS = {name: found.needed_by for name, found in settings_of(PeriodConfig).items() if found.needed_by}
"""The settings of `method.period` that some rules need and the others refuse, each with the rules that need it."""


def build_scaling(method: MethodConfig) -> Scaling:
    """Returns the preset's rule for the gain."""
    if method.preset in ("sync", "local"):
        return NoScaling()
    if method.preset in ("acc-lin", "local-lin"):
        return LinearScaling(method.linear_warmup)
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


def build_inner(config: OptimizerConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Returns the torch optimizer that steps one replica."""
    import torch

    if config.name == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def build_optimizer(
    config: TrainConfig, model: torch.nn.Module, length: RunLength, communicator: Communicator
) -> LocalOptimizer | SynchronousOptimizer:
    """Returns the optimizer of the configured method around the configured torch optimizer; all ranks call it together."""
    from hvdlocal.averaging import LocalOptimizer, SynchronousOptimizer

    method = config.method
    buffers = cast("Buffers", method.buffers)
    inner = build_inner(config.optimizer, model)
    scaling = build_scaling(method)
    if method.is_local:
        warmup = config.schedule.warmup_epochs * length.epoch
        return LocalOptimizer(
            inner,
            model,
            period=build_period(method.period, config.optimizer.lr, warmup, length.epoch),
            scaling=scaling,
            momentum=method.momentum,
            buffers=buffers,
            accumulate=micro_batches_per_step(method),
            budget=length.budget,
            max_norm=config.optimizer.max_norm,
            rate_for_period=method.period.rate,
            communicator=communicator,
        )
    return SynchronousOptimizer(
        inner,
        model,
        accumulate=micro_batches_per_step(method),
        scaling=scaling,
        buffers=buffers,
        budget=length.budget,
        max_norm=config.optimizer.max_norm,
        communicator=communicator,
    )


def is_local(optimizer: LocalOptimizer | SynchronousOptimizer) -> TypeGuard[LocalOptimizer]:
    """Whether it takes local steps."""
    from hvdlocal.averaging import LocalOptimizer

    return isinstance(optimizer, LocalOptimizer)
