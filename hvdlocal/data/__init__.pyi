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
from .read.user_arrays import open_arrays as open_arrays
from .read.user_hdf5 import open_hdf5 as open_hdf5
from .load.loader import Loader as Loader, evaluation_batches as evaluation_batches
from .load.torch_dataset import EpochSampler as EpochSampler, TorchDataset as TorchDataset
from .write.array_writer import ArraySource as ArraySource, ArrayWriter as ArrayWriter
from .write.image_writer import ImageSource as ImageSource, ShardWriter as ShardWriter
from .write.token_writer import TokenWriter as TokenWriter, TokenSource as TokenSource
from .write.jpeg_writer import JpegSample as JpegSample, JpegShardWriter as JpegShardWriter, JpegSource as JpegSource
from .write.split_writer import BadSamplesError as BadSamplesError
from .write.verify import verify as verify
