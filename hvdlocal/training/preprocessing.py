"""From the configuration to the inputs that the model sees."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

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
    Transform,
)
from hvdlocal.data.read.dataset import StoredSamples
from hvdlocal.import_path import OwnCodeError, call, check_arguments, own_code
from hvdlocal.training.config import DataConfig

USUAL_TEST_CROP = 224 / 256
"""Share of a resized test image's side that its central crop keeps where images are reduced: the usual protocol of ImageNet."""

USUAL_MIN_AREA = 0.08
"""Smallest share of a training image that a random resized crop keeps where images are reduced: Szegedy et al. (CVPR 2015)."""

MIN_AREA_OF_SMALL_IMAGES = 0.25
"""The same share where images are not reduced; no crop is then enlarged to more than about twice its side."""


@dataclass(frozen=True)
class Preprocessing:
    """How training and test images are cut, augmented and normalised. Other samples are left as they are.

    Attributes:
        shape: (height, width, channels) of what the model sees; None if the samples are no images.
        crop, transform, mix: of the training samples; see `Loader`.
        test_crop, test_transform: of the test samples; see `evaluation_batches`.
        description: what is cut out of the images, for a log; empty if they are left as they are.
    """

    shape: tuple[int, int, int] | None
    crop: Crop | None
    transform: Transform | None
    mix: Mix | None
    test_crop: Crop | None
    test_transform: Transform | None
    description: str = ""


def preprocessing_from_config(
    config: DataConfig, data: StoredSamples, test_data: StoredSamples | None = None
) -> Preprocessing:
    """Returns the preprocessing that a configuration describes.

    Args:
        config: the settings.
        data: the training images, whose mean and standard deviation normalise all images.
        test_data: the test images; the training images too unless given.

    Raises:
        ValueError: settings that contradict each other or the data.
    """
    own = _own_transform(config)
    if data.kind not in ("images", "jpeg"):
        _refuse_image_settings(config, data.kind)
        return Preprocessing(None, None, own[0] if own else None, None, None, None)
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
        return Preprocessing(data.shape, None, Compose([*augment, *own]), mix, None, normalize)
    min_area, test_crop = config.min_area, config.test_crop
    if min_area is None:
        min_area = USUAL_MIN_AREA if _most_are_larger(data, size) else MIN_AREA_OF_SMALL_IMAGES
    if test_crop is None:
        test_crop = USUAL_TEST_CROP if _most_are_larger(test_data or data, size) else 1.0
    crop = RandomResizedCrop(size, scale=(min_area, 1.0))
    center = CenterCrop(size, max(size, round(size / test_crop)))
    transform = Compose([*([Flip()] if config.flip else []), *augment, normalize, *own])
    tested = (test_data or data).shape
    kept = f"the central {100 * test_crop:g} % of each side"
    if test_crop == 1:
        kept = "the whole image" if tested is not None and tested[0] == tested[1] else "the largest central square"
    description = (
        f"brought to {size} pixels; training takes random crops of {100 * min_area:g} to 100 % of the area, "
        f"testing {kept}"
    )
    if data.shape is None:
        return Preprocessing((size, size, 3), crop, transform, mix, center, normalize, description)
    shape = (size, size, data.shape[2])
    return Preprocessing(shape, None, Compose([crop, transform]), mix, None, Compose([center, normalize]), description)


IMAGE_SETTINGS = ("crop_padding", "flip", "image_size", "randaugment", "mixup")
"""The settings that change images, and have no meaning for samples of another kind."""


def _refuse_image_settings(config: DataConfig, kind: str) -> None:
    defaults = {field.name: field.default for field in fields(DataConfig)}
    for name in IMAGE_SETTINGS:
        if (value := getattr(config, name)) != defaults[name]:
            raise ValueError(f"data.{name}={value} changes images, but the data are {kind}: leave it out")


def _own_transform(config: DataConfig) -> list[Transform]:
    """Returns the user's transform, if the configuration names one."""
    path, setting = config.transform, "data.transform"
    if path is None:
        return []
    transform = call(path, setting, arguments=config.transform_arguments)
    check_arguments(transform, path, setting, "inputs", "keys", arguments={})

    def checked(inputs: Any, keys: Any) -> Any:
        with own_code(f"{setting}={path}"):
            transformed = transform(inputs, keys)
        if not isinstance(transformed, type(inputs)):
            raise OwnCodeError(
                f"{setting}={path}: it returned {type(transformed).__name__}, not {type(inputs).__name__}"
            )
        return transformed

    return [checked]


def _most_are_larger(data: StoredSamples, size: int) -> bool:
    """Returns whether the shorter side of at least half of the images is longer than `size`, so that they are reduced."""
    if data.shape is not None:
        return min(data.shape[:2]) > size
    assert data.dims is not None
    return bool((data.dims.min(axis=1) > size).mean() >= 0.5)
