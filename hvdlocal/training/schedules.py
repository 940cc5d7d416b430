"""Schedules: the base learning rate γ(s) as a function of the progress s."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hvdlocal.import_path import OwnCodeError, check_arguments, is_import_path, load, own_code
from hvdlocal.training.config import ScheduleConfig

Schedule = Callable[[float], float]
"""Maps the progress (scale-invariant iterations) to a learning rate."""


TRIED = 1000
"""Parts of a run at whose ends a schedule of the user's own is tried before training."""


def build_schedule(config: ScheduleConfig, peak: float, budget: float, epoch: float) -> Schedule:
    """Returns the schedule that a configuration describes.

    Args:
        config: the shape and its settings, in scale-invariant epochs.
        peak: γ, the learning rate after the warm-up.
        budget: S, the progress at which the run ends.
        epoch: progress of one scale-invariant epoch.

    Raises:
        ValueError: settings that contradict each other.
    """
    warmup = config.warmup_epochs * epoch
    if not 0 <= warmup < budget:
        raise ValueError(
            f"schedule.warmup_epochs={config.warmup_epochs}: must be at least 0 and less than the run's {budget / epoch:g} epochs"
        )
    if not 0 <= config.final_lr <= peak:
        raise ValueError(f"schedule.final_lr={config.final_lr}: must lie between 0 and optimizer.lr={peak}")
    if (config.step_epochs is not None) != (config.name == "step"):
        raise ValueError(
            f"schedule.step_epochs={config.step_epochs} with schedule.name={config.name}: it belongs to step alone"
        )
    if config.step_epochs is not None and not config.step_epochs > 0:
        raise ValueError(f"schedule.step_epochs={config.step_epochs}: must be positive")

    own = _own_schedule(config, peak, budget, epoch) if is_import_path(config.name) else None

    def after_warmup(s: float) -> float:
        """Returns the share of the way from `final_lr` to the peak."""
        done = min((s - warmup) / (budget - warmup), 1.0)
        if config.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if config.name == "linear":
            return 1 - done
        return 1.0

    def schedule(s: float) -> float:
        if s < warmup:
            return config.final_lr + (peak - config.final_lr) * s / warmup
        if own is not None:
            return own(s)
        if config.step_epochs is not None:
            return peak * config.step_factor ** math.floor(s / (config.step_epochs * epoch))
        return config.final_lr + (peak - config.final_lr) * after_warmup(s)

    return schedule


def _own_schedule(config: ScheduleConfig, peak: float, budget: float, epoch: float) -> Schedule:
    """Returns the user's schedule as a function of progress, once it has been tried all along.

    Raises:
        ValueError: it cannot be called, or returns no rate.
    """
    path, setting = config.name, "schedule.name"
    arguments = {"epochs": budget / epoch, "lr": peak, **config.arguments}
    function: Callable[..., Any] = load(path, setting)
    check_arguments(function, path, setting, 0.0, arguments=arguments)

    def own(s: float) -> float:
        with own_code(f"{setting}={path}"):
            rate = function(s / epoch, **arguments)
        try:
            found = float(rate)  # a NumPy scalar or a tensor of one number will do
        except (TypeError, ValueError, RuntimeError):
            found = math.nan
        if not 0 <= found < math.inf:
            raise OwnCodeError(
                f"{setting}={path}: it returned {rate!r} at epoch {s / epoch:g}; a learning rate is a number of at least 0"
            )
        return found

    start = config.warmup_epochs * epoch
    for part in range(TRIED + 1):
        own(start + (budget - start) * part / TRIED)
    return own
