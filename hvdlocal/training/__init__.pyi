from .config import TrainConfig as TrainConfig
from .configuration import load_config as load_config
from .interruption import Interrupted as Interrupted
from .schedules import Schedule as Schedule, build_schedule as build_schedule
from .callbacks.base import Callback as Callback, RunView as RunView
from .errors import (
    CallbackError as CallbackError,
    DamageError as DamageError,
    DivergedError as DivergedError,
    LostRankError as LostRankError,
)
from .output_directory import AlreadyFinished as AlreadyFinished
from .own_loop import Checkpoints as Checkpoints, Restored as Restored
from .recorder import Summary as Summary
from .train import train as train
from .trainer import Trainer as Trainer
