"""From bytes to the numbers that a network wants."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdlocal.data.augment.base import on_device
from hvdlocal.data.buffer_pool import BufferPool

_CHUNK = 1 << 17  # elements that pass through all steps while they are in the cache


class Normalize:
    """(pixel / 255 - mean) / std.

    Args:
        mean: one number per channel, in units of pixel / 255; `ShardedDataset.mean`.
        std: likewise; `ShardedDataset.std`.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(
                f"mean {mean} and std {std} must hold one number per channel, and every std must be positive"
            )
        std_tensor = torch.tensor(std, dtype=torch.float64, device="cpu").view(-1, 1, 1)
        self._scale = (1 / (255 * std_tensor)).float()
        self._shift = (-torch.tensor(mean, dtype=torch.float64, device="cpu").view(-1, 1, 1) / std_tensor).float()
        self._numbers = tuple(self._scale.view(-1).tolist()), tuple(self._shift.view(-1).tolist())
        self._buffers = BufferPool()

    def __call__(self, images: Tensor, keys: NDArray[np.uint64] | None = None) -> Tensor:
        """Normalises uint8 (n, H, W, C) images to contiguous float32 (n, C, H, W); `keys` are not used."""
        return self._normalize(images.permute(0, 3, 1, 2))

    def _normalize(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.shape[1] != len(self._scale):
            raise ValueError(
                f"images are {images.dtype} with {images.shape[1]} channels, but mean and std are for "
                f"uint8 with {len(self._scale)}"
            )
        if images.device.type != "cpu":
            scale, shift = self._constants(images.device)
            pixels = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            return pixels.mul_(scale).add_(shift)
        out = self._buffers.empty(images.shape, torch.float32)
        if images.numel() > 0:
            step = max(1, _CHUNK // images[0].numel())
            for pixels, bytes_ in zip(out.split(step), images.split(step), strict=True):
                pixels.copy_(bytes_.contiguous()).mul_(self._scale).add_(self._shift)
        return out

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What pixels are multiplied by, and what is added, on a device: float32 (C, 1, 1) each."""
        return _on_device(self._numbers[0], device), _on_device(self._numbers[1], device)


@lru_cache(maxsize=64)
def _on_device(per_channel: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 (C, 1, 1), copied once and not for every batch."""
    return on_device(torch.tensor(per_channel, dtype=torch.float32, device="cpu").view(-1, 1, 1), device)
