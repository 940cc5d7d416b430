from . import averaging as averaging
from . import cli as cli
from . import communicator as communicator
from . import data as data
from . import models as models
from . import plan as plan
from . import training as training
from .averaging.gain import (
    AdaScale as AdaScale,
    LinearScaling as LinearScaling,
    LocalAdaScale as LocalAdaScale,
    NoScaling as NoScaling,
    gain_ratio as gain_ratio,
)
from .averaging.local import LocalOptimizer as LocalOptimizer
from .averaging.period import (
    QSR as QSR,
    AdaComm as AdaComm,
    ConstantPeriod as ConstantPeriod,
    PostLocal as PostLocal,
    PowerRule as PowerRule,
)
from .averaging.nonfinite import NonFiniteError as NonFiniteError
from .averaging.outer import nesterov as nesterov, slowmo as slowmo
from .averaging.statistics import gradient_statistics as gradient_statistics
from .averaging.synchronous import SynchronousOptimizer as SynchronousOptimizer
from .communicator.agreement import DisagreementError as DisagreementError
from .communicator.base import (
    CollectiveTimeoutError as CollectiveTimeoutError,
    CommunicationError as CommunicationError,
    Communicator as Communicator,
)
from .communicator.launch import init as init
from .data.read.dataset import ShardedDataset as ShardedDataset
from .data.load.loader import Loader as Loader
from .data.write.array_writer import ArrayWriter as ArrayWriter
from .data.write.image_writer import ShardWriter as ShardWriter
from .data.write.token_writer import TokenWriter as TokenWriter
from .training.config import TrainConfig as TrainConfig
from .training.configuration import load_config as load_config
from .training.interruption import Interrupted as Interrupted
from .training.output_directory import AlreadyFinished as AlreadyFinished
from .training.tasks.base import Task as Task
from .training.own_loop import Checkpoints as Checkpoints
from .report.frames import read_metrics as read_metrics
from .training.callbacks.base import Callback as Callback
from .training.train import train as train
from .training.trainer import Trainer as Trainer
from .plan.cost import pseudo_wall_clock as pseudo_wall_clock
from .version import __version__ as __version__
