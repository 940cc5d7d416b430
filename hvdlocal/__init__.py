"""Local SGD on MPI clusters: parameters averaged with one Horovod allreduce every H steps. See README.md."""

from hvdlocal.analysis import pseudo_wall_clock
from hvdlocal.averaging import (
    QSR,
    AdaComm,
    AdaScale,
    ConstantPeriod,
    LinearScaling,
    LocalAdaScale,
    LocalOptimizer,
    NonFiniteError,
    NoScaling,
    PostLocal,
    PowerRule,
    SynchronousOptimizer,
    gain_ratio,
    gradient_statistics,
)
from hvdlocal.communicator import (
    CollectiveTimeoutError,
    CommunicationError,
    Communicator,
    DisagreementError,
    init,
)
from hvdlocal.data import Loader, ShardedDataset, ShardWriter
from hvdlocal.version import __version__

__all__ = [
    "QSR",
    "AdaComm",
    "AdaScale",
    "CollectiveTimeoutError",
    "CommunicationError",
    "Communicator",
    "ConstantPeriod",
    "DisagreementError",
    "LinearScaling",
    "Loader",
    "LocalAdaScale",
    "LocalOptimizer",
    "NoScaling",
    "NonFiniteError",
    "PostLocal",
    "PowerRule",
    "ShardWriter",
    "ShardedDataset",
    "SynchronousOptimizer",
    "__version__",
    "gain_ratio",
    "gradient_statistics",
    "init",
    "pseudo_wall_clock",
]
