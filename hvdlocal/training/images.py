"""From the configuration to the images that the model sees."""

from __future__ import annotations

from dataclasses import dataclass

from hvdlocal.data import (
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
    ShardedDataset,
    Transform,
)
from hvdlocal.training.config import DataConfig

RESIZE_FACTOR = 256 / 224
"""Test images are resized so that the shorter side is this much longer than the central crop: the usual 256 for 224."""


@dataclass(frozen=True)
class Images:
    """How training and test images are cut, augmented and normalised.

    Attributes:
        shape: (height, width, channels) of what the model sees.
        crop, transform, mix: of the training images; see `Loader`.
        test_crop, test_transform: of the test images; see `evaluation_batches`.
    """

    shape: tuple[int, int, int]
    crop: Crop | None
    transform: Transform
    mix: Mix | None
    test_crop: Crop | None
    test_transform: Transform


def configured_images(config: DataConfig, data: ShardedDataset) -> Images:
    """What the configuration makes of a data set's images.

    Raises:
        ValueError: settings that contradict each other or the data.
    """
    size = config.image_size
    if data.shape is None and size is None:
        raise ValueError(f"{config.path} holds JPEGs of many sizes: set data.image_size (224 for most ImageNet models)")
    if size is not None and config.crop_padding:
        raise ValueError(
            f"data.crop_padding={config.crop_padding} and data.image_size={size} are two ways of cropping: choose one"
        )
    mix = MixUp(config.mixup, data.num_classes) if config.mixup else None
    augment: list[Transform] = [RandAugment(config.randaugment_ops, config.randaugment)] if config.randaugment else []
    normalize = Normalize(data.mean, data.std)
    if size is None:
        assert data.shape is not None
        if config.crop_padding or config.flip:
            augment.append(CropFlip(data.mean, data.std, padding=config.crop_padding, flip=config.flip))
        else:
            augment.append(normalize)
        return Images(data.shape, None, Compose(augment), mix, None, normalize)
    crop = RandomResizedCrop(size, scale=(config.min_area, 1.0))
    center = CenterCrop(size, round(size * RESIZE_FACTOR))
    transform = Compose([*([Flip()] if config.flip else []), *augment, normalize])
    if data.shape is None:
        return Images((size, size, 3), crop, transform, mix, center, normalize)
    shape = (size, size, data.shape[2])
    return Images(shape, None, Compose([crop, transform]), mix, None, Compose([center, normalize]))
