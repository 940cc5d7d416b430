"""Batch transforms: uint8 NHWC images to normalised float32 NCHW, on whatever device the batch is on."""

from __future__ import annotations

from hvdlocal.data.augment.base import Compose, Crop, Mix, Transform
from hvdlocal.data.augment.crop import CropFlip, Flip
from hvdlocal.data.augment.mixup import MixUp
from hvdlocal.data.augment.normalize import Normalize
from hvdlocal.data.augment.rand_augment import RandAugment
from hvdlocal.data.augment.resized_crop import CenterCrop, RandomResizedCrop

__all__ = [
    "CenterCrop",
    "Compose",
    "Crop",
    "CropFlip",
    "Flip",
    "Mix",
    "MixUp",
    "Normalize",
    "RandAugment",
    "RandomResizedCrop",
    "Transform",
]
