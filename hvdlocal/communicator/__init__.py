"""The only package that imports Horovod, MPI or torch.distributed. Everything above it uses a `Communicator`."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
