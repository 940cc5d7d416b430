"""Data sets in HDF5 shards: writing them, reading them, and the order in which ranks see them."""

from hvdlocal.data.augment import (
    CenterCrop,
    Compose,
    Crop,
    CropFlip,
    Flip,
    Mix,
    MixUp,
    Normalize,
    RandAugment,
    RandomResizedCrop,
    Transform,
)
from hvdlocal.data.dataset import ShardedDataset
from hvdlocal.data.foreign import open_hdf5
from hvdlocal.data.loader import Loader, evaluation_batches
from hvdlocal.data.torch_face import EpochSampler, TorchDataset
from hvdlocal.data.writer import ShardWriter

__all__ = [
    "CenterCrop",
    "Compose",
    "Crop",
    "CropFlip",
    "EpochSampler",
    "Flip",
    "Loader",
    "Mix",
    "MixUp",
    "Normalize",
    "RandAugment",
    "RandomResizedCrop",
    "ShardWriter",
    "ShardedDataset",
    "TorchDataset",
    "Transform",
    "evaluation_batches",
    "open_hdf5",
]
