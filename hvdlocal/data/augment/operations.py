"""The operations of RandAugment on batches of uint8 images, each equal to torchvision's.

Three kinds suffice: a map moves pixels, a table replaces each value by another, a blend mixes two images.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdlocal.data.augment.base import on_device

_BYTES = torch.arange(256, dtype=torch.float32, device="cpu")


def shear_map(height: int, width: int, x: float, y: float) -> Tensor:
    """`warp` map of a shear about the top left corner: source x + `x` * y, y + `y` * x."""
    rows, columns = np.ogrid[0.5:height, 0.5:width]
    return _nearest(rows + y * columns, columns + x * rows, height, width)


def translation_map(height: int, width: int, right: int, down: int) -> Tensor:
    """`warp` map of a shift by whole pixels."""
    rows, columns = np.ogrid[0.5:height, 0.5:width]
    return _nearest(rows - down + 0 * columns, columns - right + 0 * rows, height, width)


def rotation_map(height: int, width: int, degrees: float) -> Tensor:
    """`warp` map of a counter-clockwise rotation about the centre."""
    rows, columns = np.ogrid[0.5 - height / 2 : height / 2, 0.5 - width / 2 : width / 2]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    source_rows = sine * columns + cosine * rows + height / 2
    source_columns = cosine * columns - sine * rows + width / 2
    return _nearest(source_rows, source_columns, height, width)


def _nearest(rows: NDArray[np.float64], columns: NDArray[np.float64], height: int, width: int) -> Tensor:
    """Of each result pixel: height * width for black, else which source pixel holds the point `rows`, `columns`."""
    row, column = np.rint(rows - 0.5).astype(np.int64), np.rint(columns - 0.5).astype(np.int64)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return torch.from_numpy(np.where(inside, row * width + column, height * width).ravel())


def warp(images: Tensor, source: Tensor) -> Tensor:
    """Each pixel replaced by another of its image, or by black.

    Args:
        images: uint8 (n, H, W, C).
        source: int64 (H * W,), the map: index of the source pixel, H * W for black.
    """
    black = images.new_zeros(len(images), 1, images.shape[3])
    return torch.cat([images.flatten(1, 2), black], dim=1).index_select(1, source).view(images.shape)


def lookup(images: Tensor, tables: Tensor) -> Tensor:
    """Each value replaced by `tables[image, channel, value]`; tables are uint8 (n, C, 256)."""
    n, channels = len(images), images.shape[3]
    offsets = torch.arange(0, n * channels * 256, 256, dtype=torch.int32, device=images.device)
    index = images + offsets.view(n, 1, 1, channels)
    return tables.reshape(-1).index_select(0, index.view(-1)).view(images.shape)


def brightness_table(factor: float) -> Tensor:
    """Values times `factor`: uint8 (256,)."""
    return _BYTES.mul(factor).clamp_(0, 255).to(torch.uint8)


def posterize_table(bits: int) -> Tensor:
    """Only the highest `bits` of each value: uint8 (256,)."""
    return (_BYTES.to(torch.uint8) >> (8 - bits)) << (8 - bits) if bits < 8 else _BYTES.to(torch.uint8)


def solarize_table(threshold: float) -> Tensor:
    """Values from `threshold` on inverted: uint8 (256,)."""
    return torch.where(_BYTES.ge(threshold), 255 - _BYTES, _BYTES).to(torch.uint8)


def contrast_tables(images: Tensor, factor: float) -> Tensor:
    """Each image drawn from its mean grey level: uint8 (n, C, 256)."""
    n, channels = len(images), images.shape[3]
    mean = (grey(images).flatten(1).sum(1, dtype=torch.float64) / images[0, :, :, 0].numel()).float()
    values = on_device(_BYTES, images.device).expand(n, 256)
    return _blend(values, mean[:, None], factor)[:, None].expand(n, channels, 256)


def autocontrast_tables(images: Tensor) -> Tensor:
    """Each channel stretched so that its values span 0..255: uint8 (n, C, 256)."""
    flat = images.flatten(1, 2)
    low, high = flat.amin(1).float()[:, :, None], flat.amax(1).float()[:, :, None]
    values = on_device(_BYTES, images.device)
    stretched = (values - low).div_((high - low).mul_(1.0 / 255)).clamp_(0, 255)
    return torch.where(high == low, values, stretched).to(torch.uint8)


def equalize_tables(images: Tensor) -> Tensor:
    """Each channel with a flat histogram, by Pillow's formula: uint8 (n, C, 256)."""
    n, _, _, channels = images.shape
    flat = images.flatten(1, 2).transpose(1, 2).long()  # (n, C, pixels)
    histogram = flat.new_zeros(n, channels, 256)
    histogram.scatter_add_(2, flat, flat.new_ones(1).expand_as(flat))
    last = histogram.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - last) // 255
    below = histogram.cumsum(2) - histogram
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    return torch.where(step > 0, table, torch.arange(256, dtype=torch.int64, device=images.device)).to(torch.uint8)


def adjust_color(images: Tensor, factor: float) -> Tensor:
    """Each pixel drawn from its grey level; `factor` 0 is grey, 1 changes nothing."""
    return images.clone() if images.shape[3] == 1 else _blend(images, grey(images), factor)


def adjust_sharpness(images: Tensor, factor: float) -> Tensor:
    """Each pixel drawn from its neighbourhood's average; `factor` 0 is smooth, 1 changes nothing, as do the edges."""
    out = images.clone()
    if min(images.shape[1:3]) <= 2:
        return out
    pixels = images.float()
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    inner = pixels[:, 1:-1, 1:-1]
    smooth = (rows[:, :, :-2] + rows[:, :, 1:-1]).add_(rows[:, :, 2:]).add_(inner, alpha=4).div_(13).round_()
    out[:, 1:-1, 1:-1] = inner.add(smooth.sub_(inner), alpha=1.0 - factor).clamp_(0, 255)
    return out


def grey(images: Tensor) -> Tensor:
    """Grey level of each pixel, rounded down: float32 (n, H, W, 1). Images of one channel are grey already."""
    if images.shape[3] == 1:
        return images.float()
    red, green, blue = images.split(1, dim=3)
    return red.float().mul_(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _blend(images: Tensor, other: Tensor, ratio: float) -> Tensor:
    return images.float().mul(ratio).add_(other, alpha=1.0 - ratio).clamp_(0, 255).to(torch.uint8)
