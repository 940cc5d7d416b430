"""What a loader applies to a batch, and how it draws random numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdlocal.data.random_keys import splitmix64


class Transform(Protocol):
    """What a loader applies to a batch. It may be called from another thread and must keep no state between calls."""

    def __call__(self, images: Tensor, keys: NDArray[np.uint64], /) -> Tensor:
        """Transforms a batch; the input is not changed.

        Args:
            images: uint8 (n, H, W, C).
            keys: uint64 (n,), 64 random bits per sample that depend on (seed, epoch, sample) alone. All randomness
                must come from them, so that a sample is augmented alike on any number of workers and after a resume.

        Returns:
            On the device of `images`: float (n, C, H', W'), or, from a transform that others follow in a
            `Compose`, uint8 (n, H', W', C).
        """


class Crop(Protocol):
    """Which part of a JPEG becomes the image: decided before it is decoded, from its dimensions.

    Attributes:
        size: side of the square, in pixels, to which the part is resized.
    """

    size: int

    def boxes(self, dims: NDArray[np.uint16], keys: NDArray[np.uint64], /) -> NDArray[np.int64]:
        """The part of each image.

        Args:
            dims: uint16 (n, 2), height and width of the images.
            keys: uint64 (n,), as for `Transform`.

        Returns:
            int64 (n, 4): top, left, height, width, in pixels of the image and inside it.
        """


class Mix(Protocol):
    """What a loader applies to a transformed batch and its labels."""

    def __call__(self, images: Tensor, labels: Tensor, keys: NDArray[np.uint64], /) -> tuple[Tensor, Tensor]:
        """Mixes the samples of a batch; the input is not changed.

        Args:
            images: float (n, C, H, W).
            labels: int64 (n,).
            keys: uint64 (n,), as for `Transform`.

        Returns:
            images (n, C, H, W), and labels as a probability of each class, float (n, num_classes).
        """


class Compose:
    """Transforms one after the other: `Compose([Flip(), RandAugment(), Normalize(mean, std)])`.

    Args:
        transforms: all but the last return uint8 (n, H, W, C).
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = tuple(transforms)

    def __call__(self, images: Tensor, keys: NDArray[np.uint64]) -> Tensor:
        """Applies all; see `Transform`."""
        for transform in self.transforms:
            images = transform(images, keys)
        return images


# Each kind of augmentation draws from numbers of its own, so that in a chain none depends on another.
FLIP, RESIZED_CROP, RAND_AUGMENT, MIXUP = range(0, 4096, 1024)

_STEP = np.uint64(0x9E3779B97F4A7C15)


def uniforms(keys: NDArray[np.uint64], first: int, count: int) -> NDArray[np.float64]:
    """Random numbers of each sample, uniform on the multiples of 2**-53 in [0, 1), shape (n, count).

    They are the outputs `first`, `first + 1` … of the SplitMix64 generator that starts at the sample's key.
    """
    states = keys[:, None] + np.arange(first, first + count, dtype=np.uint64) * _STEP
    return (splitmix64(states) >> np.uint64(11)) * 2.0**-53


def check_keys(keys: NDArray[np.uint64] | None, n: int) -> NDArray[np.uint64]:
    """Returns `keys`. Raises ValueError unless there are n of them."""
    if keys is None or keys.shape != (n,):
        raise ValueError(f"one key per image is needed, shape ({n},); Loader supplies them")
    return keys


def check_images(images: Tensor, channels: Sequence[int] | None = None) -> None:
    """Raises ValueError unless `images` are uint8 (n, H, W, C), with a C among `channels`."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; uint8 (n, H, W, C) is needed")
    if channels is not None and images.shape[3] not in channels:
        raise ValueError(f"images have {images.shape[3]} channels; {' or '.join(map(str, channels))} are needed")


def on_device(values: NDArray[np.generic] | Tensor, device: torch.device) -> Tensor:
    """`values` on the device of a batch. A GPU copies them from pinned memory, so that the program does not wait for it."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def replace_some(images: Tensor, chosen: NDArray[np.int64], change: Callable[[Tensor], Tensor]) -> None:
    """Applies `change` to those of the `images` (n, …) whose numbers are `chosen` (m,), in place."""
    if images.device.type == "cpu":  # where NumPy's indexing is several times faster than torch's
        array = images.numpy()
        array[chosen] = change(torch.from_numpy(array[chosen])).numpy()
    else:
        index = on_device(chosen, images.device)
        images.index_copy_(0, index, change(images.index_select(0, index)))
