"""`hvdlocal plan`: what a schedule costs, as arithmetic, before anything is trained."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
