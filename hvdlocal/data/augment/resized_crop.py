"""Cutting out a part and resizing it: where JPEGs are cut before decoding, and the same for images of a fixed size."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdlocal.data.augment.base import RESIZED_CROP, check_images, check_keys, on_device, uniforms

_ATTEMPTS = 10


class RandomResizedCrop:
    """A part of random area and aspect ratio, resized to a square: torchvision's algorithm (Szegedy et al., CVPR 2015).

    Up to ten times an area (uniform in `scale`) and an aspect ratio (log-uniform in `ratio`) are drawn; the first
    that fits into the image is put anywhere in it. If none fits, the part is the largest central one whose aspect
    ratio lies in `ratio`.

    As a `Crop` it gives the boxes to decode; as a `Transform` it cuts and resizes uint8 images of a fixed size, with
    antialiased bilinear interpolation (the triangle filter of Pillow and torchvision).

    Args:
        size: side of the result, in pixels.
        scale: bounds of the part's area, as a fraction of the image.
        ratio: bounds of width / height of the part.
    """

    def __init__(
        self, size: int, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
    ) -> None:
        _check_size(size)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale is {scale}; it must be (smallest, largest) with 0 < smallest <= largest <= 1")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio is {ratio}; it must be (smallest, largest) with 0 < smallest <= largest")
        self.size = size
        self.scale = scale
        self.ratio = ratio

    def boxes(self, dims: NDArray[np.uint16], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Top, left, height, width (int64 (n, 4)) of the part of each image of height, width `dims` (n, 2)."""
        height, width = dims.astype(np.int64).T
        draws = uniforms(check_keys(keys, len(dims)), RESIZED_CROP, 2 * _ATTEMPTS + 2)
        draw_area, draw_ratio = draws[:, :_ATTEMPTS], draws[:, _ATTEMPTS:-2]
        area = (height * width)[:, None] * (self.scale[0] + draw_area * (self.scale[1] - self.scale[0]))
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = np.exp(low + draw_ratio * (high - low))
        part_width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        part_height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (part_width > 0) & (part_width <= width[:, None]) & (part_height > 0) & (part_height <= height[:, None])

        first = np.arange(len(dims)), fits.argmax(axis=1)
        part_height, part_width = part_height[first], part_width[first]
        top = (draws[:, -2] * (height - part_height + 1)).astype(np.int64)
        left = (draws[:, -1] * (width - part_width + 1)).astype(np.int64)
        random = np.stack([top, left, part_height, part_width], axis=1)

        central_height = np.rint(width / self.ratio[0]).astype(np.int64).clip(1, height)
        central_width = np.rint(height * self.ratio[1]).astype(np.int64).clip(1, width)
        central = np.stack(
            [(height - central_height) // 2, (width - central_width) // 2, central_height, central_width], axis=1
        )
        return np.where(fits.any(axis=1)[:, None], random, central)

    def __call__(self, images: Tensor, keys: NDArray[np.uint64]) -> Tensor:
        """Cuts and resizes uint8 (n, H, W, C) images to uint8 (n, size, size, C), as their `keys` (n,) say."""
        check_images(images)
        n, height, width, _ = images.shape
        top, left, part_height, part_width = self.boxes(np.tile([[height, width]], (n, 1)), keys).T
        step_down, step_right = part_height / self.size, part_width / self.size
        down = _weights(height, self.size, top, step_down, top, top + part_height, images.device)
        right = _weights(width, self.size, left, step_right, left, left + part_width, images.device)
        return _resample(images, down, right)


class CenterCrop:
    """The central square after resizing the shorter side to `resize`: torchvision's Resize and CenterCrop.

    As a `Crop` it gives the boxes to decode, to the nearest pixel of the original; as a `Transform` it does both
    steps at once on uint8 images of a fixed size, with antialiased bilinear interpolation.

    Args:
        size: side of the result, in pixels.
        resize: length of the shorter side before the cut; 256 for a size of 224 is usual.
    """

    def __init__(self, size: int, resize: int) -> None:
        _check_size(size)
        if resize < size:
            raise ValueError(f"resize is {resize}, less than the size {size} that is cut out afterwards")
        self.size = size
        self.resize = resize

    def boxes(self, dims: NDArray[np.uint16], keys: NDArray[np.uint64] | None = None) -> NDArray[np.int64]:
        """Top, left, height, width (int64 (n, 4)) of the part of each image; `keys` are not used."""
        sides = dims.astype(np.int64)
        resized, start = self._geometry(sides)
        part = np.rint(self.size * sides / resized).astype(np.int64).clip(1, sides)
        corner = np.rint(start * sides / resized).astype(np.int64).clip(0, sides - part)
        return np.concatenate([corner, part], axis=1)

    def __call__(self, images: Tensor, keys: NDArray[np.uint64] | None = None) -> Tensor:
        """Resizes and cuts uint8 (n, H, W, C) images to uint8 (n, size, size, C); `keys` are not used."""
        check_images(images)
        dims = np.array([images.shape[1:3]], np.int64)
        resized, start = self._geometry(dims)
        step = dims / resized
        corner, first = start * step, np.zeros_like(dims)
        down, right = (
            _weights(length, self.size, corner[:, i], step[:, i], first[:, i], dims[:, i], images.device)
            for i, length in enumerate(images.shape[1:3])
        )
        return _resample(images, down, right)

    def _geometry(self, dims: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Height and width after resizing, and the cut's top and left in it: two (n, 2)."""
        resized = self.resize * dims // dims.min(axis=1, keepdims=True)
        return resized, np.rint((resized - self.size) / 2).astype(np.int64)


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size is {size}; the result needs at least one pixel")


def _weights(
    length: int,
    size: int,
    start: NDArray[np.float64],
    step: NDArray[np.float64],
    first: NDArray[np.int64],
    stop: NDArray[np.int64],
    device: torch.device,
) -> Tensor:
    """How much each of `length` source pixels counts in each of `size` result pixels: float32 (n, size, length).

    Result pixel i covers `step` source pixels from `start + i * step` on, and sees a triangle of twice that width
    (at least two pixels), of which only the source pixels first..stop-1 exist.
    """
    centre = start[:, None] + (np.arange(size) + 0.5) * step[:, None] - 0.5
    inverse = 1 / np.maximum(step, 1)
    pixel = torch.arange(length, dtype=torch.int64, device=device)
    exists = (pixel >= _column(first, device)) & (pixel < _column(stop, device))
    distance = (pixel - on_device(centre.astype(np.float32), device)[:, :, None]).abs_()
    weights = (1 - distance.mul_(_column(inverse, device).float())).clamp_(min=0).mul_(exists)
    return weights.div_(weights.sum(dim=2, keepdim=True))


def _column(values: NDArray[np.generic], device: torch.device) -> Tensor:
    return on_device(values, device)[:, None, None]


def _resample(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """uint8 (n, H, W, C) to uint8 (n, size, size, C) by weights (n, size, H) and (n, size, W), or (1, …) for all."""
    n, height, width, channels = images.shape
    size = down.shape[1]
    with torch.autocast(images.device.type, enabled=False):
        rows = torch.matmul(down, images.float().view(n, height, width * channels))
        columns = rows.view(n, size, width, channels).transpose(1, 2).reshape(n, width, size * channels)
        pixels = torch.matmul(right, columns).view(n, size, size, channels)
    return pixels.round_().clamp_(0, 255).to(torch.uint8).transpose(1, 2).contiguous()
