"""Data sets in HDF5 shards: writing them, reading them, and the order in which ranks see them."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
