"""`hvdlocal plan`: computes what a run will do and cost before anything is trained."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
