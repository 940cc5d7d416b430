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
from .read.dataset import ShardedDataset as ShardedDataset
from .read.user_hdf5 import open_hdf5 as open_hdf5
from .load.loader import Loader as Loader, evaluation_batches as evaluation_batches
from .load.torch_dataset import EpochSampler as EpochSampler, TorchDataset as TorchDataset
from .write.writer import (
    BadSamplesError as BadSamplesError,
    ImageSource as ImageSource,
    JpegSample as JpegSample,
    JpegShardWriter as JpegShardWriter,
    JpegSource as JpegSource,
    ShardWriter as ShardWriter,
    verify as verify,
)
