from .gain import (
    AdaScale as AdaScale,
    LinearScaling as LinearScaling,
    LocalAdaScale as LocalAdaScale,
    NoScaling as NoScaling,
    Scaling as Scaling,
    gain_ratio as gain_ratio,
)
from .local import LocalOptimizer as LocalOptimizer
from .period import (
    QSR as QSR,
    AdaComm as AdaComm,
    ConstantPeriod as ConstantPeriod,
    PeriodRule as PeriodRule,
    PostLocal as PostLocal,
    PowerRule as PowerRule,
)
from .nonfinite import NonFiniteError as NonFiniteError
from .replica import ReplicaOptimizer as ReplicaOptimizer
from .statistics import gradient_statistics as gradient_statistics
from .synchronous import SynchronousOptimizer as SynchronousOptimizer
