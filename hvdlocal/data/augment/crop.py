"""Shifting and mirroring images of a fixed size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hvdlocal.data.augment.base import FLIP, check_images, check_keys, on_device, replace_some, uniforms
from hvdlocal.data.augment.normalize import Normalize


class CropFlip(Normalize):
    """Random crop after zero padding, random horizontal flip, then `Normalize`: the usual augmentation of CIFAR.

    Each image draws its own offsets in 0..2*padding (uniform) and its own flip (probability 1/2).

    Args:
        mean: see `Normalize`.
        std: see `Normalize`.
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
        """Crops, flips and normalises uint8 (n, H, W, C) images to float32 (n, C, H, W), as their `keys` (n,) say."""
        check_images(images)
        draw = self._draw(check_keys(keys, len(images)))
        if images.is_cuda and (kernel := _kernel(images.device)) is not None:
            places = on_device(np.stack(draw, axis=1).astype(np.int32), images.device)
            with torch.cuda.device(images.device):
                return kernel(images.contiguous(), places, *self._constants(images.device), self.padding)
        cropped = self._on_cpu(images, *draw) if images.device.type == "cpu" else self._on_device(images, *draw)
        return self._normalize(cropped)

    def _on_cpu(
        self, images: Tensor, top: NDArray[np.int64], left: NDArray[np.int64], mirrored: NDArray[np.bool_]
    ) -> Tensor:
        n, height, width, channels = images.shape
        padded_height, padded_width = height + 2 * self.padding, width + 2 * self.padding
        padded = self._buffers.empty((n, padded_height, padded_width, channels), torch.uint8)
        inside = slice(self.padding, self.padding + height), slice(self.padding, self.padding + width)
        padded.zero_()[:, inside[0], inside[1]] = images

        # A row of a crop is one piece of memory. Seen as an array that has such a piece begin at every byte, NumPy
        # copies the rows as fast as they can be copied.
        row = f"V{width * channels}"
        pieces = np.ndarray(max(padded.numel() - width * channels + 1, 0), row, padded.numpy(), strides=(1,))
        rows = (np.arange(n) * padded_height + top)[:, None] + np.arange(height)
        cropped = pieces[(rows * padded_width + left[:, None]) * channels].view(np.uint8)
        planes = torch.from_numpy(cropped).view(images.shape).permute(0, 3, 1, 2).contiguous()
        replace_some(planes, np.flatnonzero(mirrored), lambda chosen: chosen.flip(3))
        return planes

    def _on_device(
        self, images: Tensor, top: NDArray[np.int64], left: NDArray[np.int64], mirrored: NDArray[np.bool_]
    ) -> Tensor:
        n, height, width, channels = images.shape
        padded = F.pad(images.permute(0, 3, 1, 2).contiguous(), (self.padding,) * 4)
        # Rows and columns are numbered here, and copied in one piece: on the device that would be many small launches.
        rows = (np.arange(height) + top[:, None]) * padded.shape[3]
        columns = np.arange(width)
        columns = np.where(mirrored[:, None], width - 1 - columns, columns) + left[:, None]
        row, column = on_device(np.concatenate([rows, columns], axis=1), images.device).split([height, width], dim=1)
        # One gather of bytes does the crop and the flip; only then do the pixels grow to four bytes each.
        source = row[:, :, None] + column[:, None, :]
        cropped = padded.flatten(2).gather(2, source.flatten(1)[:, None].expand(n, channels, height * width))
        return cropped.view(n, channels, height, width)

    def _draw(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Top and left offset (int64) and flip (bool) of each image, from disjoint bits of its key."""
        bits = np.uint64(2**24 - 1)
        positions = np.uint64(2 * self.padding + 1)
        top = (keys & bits) * positions >> np.uint64(24)
        left = (keys >> np.uint64(24) & bits) * positions >> np.uint64(24)
        mirrored = (keys >> np.uint64(63)).astype(bool) & self.flip
        return top.astype(np.int64), left.astype(np.int64), mirrored


@lru_cache(maxsize=16)
def _kernel(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor] | None:
    """All of `CropFlip` in one launch; None where it cannot be compiled."""
    try:
        from hvdlocal.data.augment.crop_kernel import crop_flip_normalize

        image = torch.zeros((1, 2, 2, 1), dtype=torch.uint8, device=device)
        places = torch.zeros((1, 3), dtype=torch.int32, device=device)
        one = torch.ones(1, dtype=torch.float32, device=device)
        with torch.cuda.device(device):
            crop_flip_normalize(image, places, one, one, 0)
    except Exception as error:  # no Triton, or no C compiler for it: it has no error of its own
        warnings.warn(f"images are cropped without a kernel of its own: {error}", stacklevel=3)
        return None
    return crop_flip_normalize


class Flip:
    """Mirrors half of the images, uint8 to uint8."""

    def __call__(self, images: Tensor, keys: NDArray[np.uint64]) -> Tensor:
        """Mirrors those of the uint8 (n, H, W, C) images whose `keys` (n,) say so."""
        check_images(images)
        mirrored = np.flatnonzero(uniforms(check_keys(keys, len(images)), FLIP, 1)[:, 0] < 0.5)
        out = images.clone()
        replace_some(out, mirrored, lambda chosen: chosen.flip(2))
        return out
