"""Data sets in HDF5 shards: writing them, reading them, and the order in which ranks see them."""

from hvdlocal.data.augment import CropFlip, Normalize
from hvdlocal.data.dataset import ShardedDataset
from hvdlocal.data.loader import Loader, evaluation_batches
from hvdlocal.data.writer import ShardWriter

__all__ = ["CropFlip", "Loader", "Normalize", "ShardWriter", "ShardedDataset", "evaluation_batches"]
