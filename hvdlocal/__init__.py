"""Local SGD on MPI clusters: parameters averaged with one Horovod allreduce every H steps. See README.md.

Names are imported at their first use (Scientific Python's SPEC 1): what needs no torch does not wait for it. They are listed
in `__init__.pyi`, here and in the subpackages.
"""

from lazy_loader import attach_stub

SUBPACKAGES = {"averaging", "cli", "communicator", "data", "models", "plan", "training"}

__getattr__, __dir__, _names = attach_stub(__name__, __file__)
__all__ = [name for name in _names if name not in SUBPACKAGES]  # `import *` should not bring a module called `data`
