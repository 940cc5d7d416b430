from .config import TrainConfig as TrainConfig
from .damage import DamageError as DamageError
from .checkpoint.coordinator import Interrupted as Interrupted
from .schedules import Schedule as Schedule, build_schedule as build_schedule
from .trainer import (
    AlreadyFinished as AlreadyFinished,
    DivergedError as DivergedError,
    LostRankError as LostRankError,
    Summary as Summary,
    Trainer as Trainer,
)
