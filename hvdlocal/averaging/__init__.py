"""The heart: when to average, at which learning rate, and the two optimizers that do it.

`gain`, `period`, `moment_periods`, `rounds` and `statistics` are arithmetic on numbers; `flat_buffer`, `sketch` and
`gradients` are memory; `averaged_replica` is what an average does with a replica, and `local` when there is one;
`synchronous` steps on the mean gradient; `replica` is what both optimizers share.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
