"""Crop, flip and normalisation of a batch as one kernel for CUDA, instead of a dozen launches that a training loop waits for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 256
"""Of an image, the work of one program."""


def crop_flip_normalize(images: Tensor, places: Tensor, scale: Tensor, shift: Tensor, padding: int) -> Tensor:
    """What `CropFlip` makes of a batch, bit for bit.

    Args:
        images: uint8 (n, H, W, C), contiguous.
        places: int32 (n, 3): top and left offset of each image in its padded image, and whether it is mirrored.
        scale, shift: float32, C elements each.
        padding: pixels of black on every side.

    Returns:
        float32 (n, C, H, W).
    """
    n, height, width, channels = images.shape
    out = torch.empty((n, channels, height, width), dtype=torch.float32, device=images.device)
    if n:
        grid = (n, triton.cdiv(height * width, PIXELS))
        _crop_flip_normalize[grid](
            images,
            places,
            scale,
            shift,
            out,
            height,
            width,
            padding,
            channels=channels,
            block=PIXELS,
            enable_fp_fusion=False,  # the CPU rounds the product before it adds
        )
    return out


@triton.jit
def _crop_flip_normalize(  # type: ignore[no-untyped-def]
    images,
    places,
    scale,
    shift,
    out,
    height,
    width,
    padding,
    channels: tl.constexpr,
    block: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * block + tl.arange(0, block)
    inside = pixel < height * width
    row, column = pixel // width, pixel % width
    column = tl.where(tl.load(places + 3 * image + 2) != 0, width - 1 - column, column)
    row += tl.load(places + 3 * image) - padding
    column += tl.load(places + 3 * image + 1) - padding
    there = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    source = images + ((image * height + row) * width + column) * channels
    target = out + image * channels * height * width + pixel
    for channel in tl.static_range(channels):
        value = tl.load(source + channel, mask=there, other=0).to(tl.float32)
        value = value * tl.load(scale + channel) + tl.load(shift + channel)
        tl.store(target + channel * height * width, value, mask=inside)
