"""Builds the optimizer that a configuration names."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard, cast

import torch

from hvdlocal.averaging import LocalOptimizer, PeriodRule, SynchronousOptimizer
from hvdlocal.averaging.buckets import BUCKET_BYTES
from hvdlocal.averaging.outer import OuterRule, default_slowmo_momentum, nesterov, slowmo
from hvdlocal.communicator import Communicator
from hvdlocal.import_path import call, is_import_path
from hvdlocal.training.config import MethodConfig, OptimizerConfig, TrainConfig
from hvdlocal.training.rules import build_period, build_scaling, micro_batches_per_step
from hvdlocal.training.run_length import RunLength

if TYPE_CHECKING:
    from hvdlocal.averaging.buffers import Buffers


def build_inner(config: OptimizerConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Returns the torch optimizer that steps one replica.

    Raises:
        ValueError: an optimizer by import path cannot be built; the message says why.
    """
    if is_import_path(config.name):
        if "lr" in config.arguments:
            raise ValueError(
                f"optimizer.arguments.lr={config.arguments['lr']}: the learning rate is optimizer.lr and the schedule's; leave "
                "it out"
            )
        arguments = {"lr": config.lr, **config.arguments}
        optimizer = call(config.name, "optimizer.name", model.parameters(), arguments=arguments)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"optimizer.name={config.name}: it returned {type(optimizer).__name__}, but an optimizer is a "
                "torch.optim.Optimizer"
            )
        return optimizer
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
    config: TrainConfig,
    model: torch.nn.Module,
    length: RunLength,
    communicator: Communicator,
    *,
    bucket_bytes: int | None = BUCKET_BYTES,
) -> LocalOptimizer | SynchronousOptimizer:
    """Returns the optimizer of the configured method around the configured torch optimizer; all ranks call it together.

    Args:
        config: optimizer and method.
        model: the replica.
        length: of the run.
        communicator: the ranks.
        bucket_bytes: see `SynchronousOptimizer`.
    """
    method = config.method
    buffers = cast("Buffers", method.buffers)
    inner = build_inner(config.optimizer, model)
    scaling = build_scaling(method)
    if method.is_local:
        return LocalOptimizer(
            inner,
            model,
            period=_period(config, length),
            scaling=scaling,
            momentum=method.momentum,
            buffers=buffers,
            accumulate=micro_batches_per_step(method),
            budget=length.budget,
            max_norm=config.optimizer.max_norm,
            rate_for_period=method.period.rate,
            island_period=method.island_period,
            outer=build_outer(method, communicator.num_islands),
            overlap=method.overlap,
            mixing=method.mixing,
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
        bucket_bytes=bucket_bytes,
        communicator=communicator,
    )


def follow_ranks(
    optimizer: LocalOptimizer | SynchronousOptimizer, config: TrainConfig, length: RunLength, progress: float
) -> None:
    """Makes of an optimizer what `build_optimizer` would make for the ranks that are left.

    Args:
        optimizer: between two steps.
        config: optimizer and method.
        length: of a run on so many ranks.
        progress: of the optimizer, in units of that length.
    """
    optimizer.restart_clock(progress, length.budget)
    if is_local(optimizer):
        optimizer.replace_rules(_period(config, length), build_outer(config.method, optimizer.num_workers))


def _period(config: TrainConfig, length: RunLength) -> PeriodRule:
    warmup = config.schedule.warmup_epochs * length.epoch
    return build_period(config.method.period, config.optimizer.lr, warmup, length.epoch)


def build_outer(method: MethodConfig, num_workers: int) -> OuterRule | None:
    """Returns the outer optimizer of a local preset, with its defaults filled in; None for plain averaging.

    Args:
        method: names it.
        num_workers: K, on which the default momentum of slowmo depends.
    """
    config, name = method.outer, method.outer_optimizer
    if name == "none":
        return None
    default = nesterov() if name == "nesterov" else slowmo(default_slowmo_momentum(num_workers))
    given = {key: value for key, value in vars(config).items() if key != "name" and value is not None}
    return replace(default, **given)


def is_local(optimizer: LocalOptimizer | SynchronousOptimizer) -> TypeGuard[LocalOptimizer]:
    """Whether it takes local steps."""
    return isinstance(optimizer, LocalOptimizer)
