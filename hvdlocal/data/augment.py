"""Batch transforms: uint8 NHWC images to normalised float32 NCHW, on whatever device the batch is on."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


class Transform(Protocol):
    """What a loader applies to a batch. It may be called from another thread and must keep no state between calls."""

    def __call__(self, images: Tensor, keys: NDArray[np.uint64], /) -> Tensor:
        """Transform a batch.

        Args:
            images: uint8 (n, H, W, C).
            keys: uint64 (n,), 64 random bits per sample that depend on (seed, epoch, sample) alone. All randomness
                must come from them, so that a sample is augmented alike on any number of workers and after a resume.

        Returns:
            float (n, C, H', W') on the device of ``images``.
        """


class Normalize:
    """(pixel / 255 - mean) / std.

    Args:
        mean, std: one number per channel, in units of pixel / 255; ``ShardedDataset.mean`` and ``.std``.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(
                f"mean {mean} and std {std} must hold one number per channel, and every std must be positive"
            )
        std_tensor = torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
        self._scale = (1 / (255 * std_tensor)).float()
        self._shift = (-torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1) / std_tensor).float()

    def __call__(self, images: Tensor, keys: NDArray[np.uint64] | None = None) -> Tensor:
        """Normalise uint8 (n, H, W, C) images to contiguous float32 (n, C, H, W); ``keys`` are not used."""
        return self._normalize(images.permute(0, 3, 1, 2))

    def _normalize(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.shape[1] != len(self._scale):
            raise ValueError(
                f"images are {images.dtype} with {images.shape[1]} channels, but mean and std are for "
                f"uint8 with {len(self._scale)}"
            )
        if self._scale.device != images.device:
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        pixels = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return pixels.mul_(self._scale).add_(self._shift)


class CropFlip(Normalize):
    """Random crop after zero padding, random horizontal flip, then ``Normalize``: the usual augmentation of CIFAR.

    Each image draws its own offsets in 0..2*padding (uniform) and its own flip (probability 1/2).

    Args:
        mean, std: see ``Normalize``.
        padding: pixels of black added on every side before an image of the original size is cut out.
        flip: whether half of the images are mirrored.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, padding: int = 4, flip: bool = True) -> None:
        super().__init__(mean, std)
        if padding < 0:
            raise ValueError(f"padding is {padding}; it must not be negative")
        self.padding = padding
        self.flip = flip

    def __call__(self, images: Tensor, keys: NDArray[np.uint64] | None = None) -> Tensor:
        """Crop, flip and normalise uint8 (n, H, W, C) images to float32 (n, C, H, W), as their ``keys`` (n,) say."""
        n, height, width, channels = images.shape
        if keys is None or keys.shape != (n,):
            raise ValueError(f"one key per image is needed, shape ({n},); Loader supplies them")
        top, left, mirrored = (torch.from_numpy(draw).to(images.device) for draw in self._draw(keys))
        rows = torch.arange(height, device=images.device) + top[:, None]
        columns = torch.arange(width, device=images.device).expand(n, width)
        columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + left[:, None]

        # One gather of bytes does the crop and the flip; only then do the pixels grow to four bytes each.
        padded = F.pad(images.permute(0, 3, 1, 2).contiguous(), (self.padding,) * 4)
        source = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
        cropped = padded.flatten(2).gather(2, source.view(n, 1, -1).expand(n, channels, -1))
        return self._normalize(cropped.view(n, channels, height, width))

    def _draw(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Top and left offset (int64) and flip (bool) of each image, from disjoint bits of its key."""
        bits = np.uint64(2**24 - 1)
        positions = np.uint64(2 * self.padding + 1)
        top = (keys & bits) * positions >> np.uint64(24)
        left = (keys >> np.uint64(24) & bits) * positions >> np.uint64(24)
        mirrored = (keys >> np.uint64(63)).astype(bool) & self.flip
        return top.astype(np.int64), left.astype(np.int64), mirrored
