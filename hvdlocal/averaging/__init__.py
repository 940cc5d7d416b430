"""The heart: when to average, at which learning rate, and the two optimizers that do it.

`gain`, `period` and `statistics` are arithmetic on numbers; `arena`, `sketch` and `gradients` are memory; `local` and
`synchronous` put them together on what `replica` shares.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
