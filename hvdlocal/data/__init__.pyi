from .augment import (
    CenterCrop as CenterCrop,
    Compose as Compose,
    Crop as Crop,
    CropFlip as CropFlip,
    Flip as Flip,
    Mix as Mix,
    MixUp as MixUp,
    Normalize as Normalize,
    RandAugment as RandAugment,
    RandomResizedCrop as RandomResizedCrop,
    Transform as Transform,
)
from .dataset import ShardedDataset as ShardedDataset
from .foreign import open_hdf5 as open_hdf5
from .loader import Loader as Loader, evaluation_batches as evaluation_batches
from .torch_face import EpochSampler as EpochSampler, TorchDataset as TorchDataset
from .writer import ShardWriter as ShardWriter
