"""The trainer: configuration, schedules, the loop, evaluation and records."""

from hvdlocal.training.config import TrainConfig
from hvdlocal.training.schedules import Schedule, build_schedule
from hvdlocal.training.trainer import DivergedError, Summary, Trainer

__all__ = ["DivergedError", "Schedule", "Summary", "TrainConfig", "Trainer", "build_schedule"]
