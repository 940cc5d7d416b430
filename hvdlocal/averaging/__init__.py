"""The heart: when to average, at which learning rate, and the two optimizers that do it.

`gain`, `period` and `statistics` are arithmetic on numbers; `arena`, `sketch` and `gradients` are memory; `local` and
`synchronous` put them together on what `replica` shares.
"""

from hvdlocal.averaging.gain import AdaScale, LinearScaling, LocalAdaScale, NoScaling, Scaling, gain_ratio
from hvdlocal.averaging.local import LocalOptimizer
from hvdlocal.averaging.period import QSR, AdaComm, ConstantPeriod, PeriodRule, PostLocal, PowerRule
from hvdlocal.averaging.replica import NonFiniteError, ReplicaOptimizer
from hvdlocal.averaging.statistics import gradient_statistics
from hvdlocal.averaging.synchronous import SynchronousOptimizer

__all__ = [
    "QSR",
    "AdaComm",
    "AdaScale",
    "ConstantPeriod",
    "LinearScaling",
    "LocalAdaScale",
    "LocalOptimizer",
    "NoScaling",
    "NonFiniteError",
    "PeriodRule",
    "PostLocal",
    "PowerRule",
    "ReplicaOptimizer",
    "Scaling",
    "SynchronousOptimizer",
    "gain_ratio",
    "gradient_statistics",
]
