"""RandAugment (Cubuk et al., NeurIPS 2020)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdlocal.data.augment import operations
from hvdlocal.data.augment.base import RAND_AUGMENT, check_images, check_keys, on_device, replace_some, uniforms

_BINS = 31  # magnitudes 0..30

OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
_WARPS = OPERATIONS[1:6]
_SIGNED = range(1, 10)  # these go either way


class RandAugment:
    """Each image goes through `num_ops` operations that it draws from fourteen: uint8 to uint8.

    The operations, their strengths and their results are torchvision's (`torchvision.transforms.RandAugment` with
    nearest-neighbour interpolation and black fill); images with the same operation go through it together.

    Args:
        num_ops: operations per image, drawn with repetition.
        magnitude: strength of all of them, 0..30.
    """

    def __init__(self, num_ops: int = 2, magnitude: int = 9) -> None:
        if num_ops < 0:
            raise ValueError(f"num_ops is {num_ops}; it must not be negative")
        if not 0 <= magnitude < _BINS:
            raise ValueError(f"magnitude is {magnitude}; it must lie in 0..{_BINS - 1}")
        self.num_ops = num_ops
        self.magnitude = magnitude

    def __call__(self, images: Tensor, keys: NDArray[np.uint64]) -> Tensor:
        """Augments uint8 (n, H, W, C) images with one or three channels, as their `keys` (n,) say."""
        check_images(images, channels=(1, 3))
        draws = uniforms(check_keys(keys, len(images)), RAND_AUGMENT, 2 * self.num_ops)
        out = images.clone()
        for turn in range(self.num_ops):
            operation = (draws[:, 2 * turn] * len(OPERATIONS)).astype(np.int64)
            negative = (draws[:, 2 * turn + 1] < 0.5) & np.isin(operation, _SIGNED)
            for number, sign in np.unique(np.stack([operation, np.where(negative, -1, 1)], axis=1), axis=0).tolist():
                chosen = np.flatnonzero((operation == number) & (negative == (sign < 0)))
                replace_some(out, chosen, partial(self.apply, OPERATIONS[number], sign))
        return out

    def apply(self, name: str, sign: int, images: Tensor) -> Tensor:
        """One of `OPERATIONS` on all uint8 (n, H, W, C) images, in the direction `sign` if it has one."""
        if name == "Identity" or images.numel() == 0:
            return images
        if name in _WARPS:
            height, width = images.shape[1:3]
            return operations.warp(images, on_device(self._map(name, height, width, sign), images.device))
        if name == "Color":
            return operations.adjust_color(images, 1 + sign * self._strength(0.9))
        if name == "Sharpness":
            return operations.adjust_sharpness(images, 1 + sign * self._strength(0.9))
        return operations.lookup(images, self._tables(name, images, sign))

    def _map(self, name: str, height: int, width: int, sign: int) -> Tensor:
        if name == "ShearX":
            return operations.shear_map(height, width, sign * self._strength(0.3), 0)
        if name == "ShearY":
            return operations.shear_map(height, width, 0, sign * self._strength(0.3))
        if name == "TranslateX":
            return operations.translation_map(height, width, sign * int(self._strength(150 / 331 * width)), 0)
        if name == "TranslateY":
            return operations.translation_map(height, width, 0, sign * int(self._strength(150 / 331 * height)))
        return operations.rotation_map(height, width, sign * self._strength(30))

    def _tables(self, name: str, images: Tensor, sign: int) -> Tensor:
        if name == "Contrast":
            return operations.contrast_tables(images, 1 + sign * self._strength(0.9))
        if name == "AutoContrast":
            return operations.autocontrast_tables(images)
        if name == "Equalize":
            return operations.equalize_tables(images)
        if name == "Brightness":
            table = operations.brightness_table(1 + sign * self._strength(0.9))
        elif name == "Posterize":
            table = operations.posterize_table(8 - round(self.magnitude * 4 / (_BINS - 1)))
        else:
            table = operations.solarize_table(255 - self._strength(255))
        return on_device(table, images.device).expand(len(images), images.shape[3], 256)

    def _strength(self, strongest: float) -> float:
        """The strength on a scale that ends at `strongest`, in torchvision's precision."""
        return float(torch.linspace(0, strongest, _BINS, dtype=torch.float32, device="cpu")[self.magnitude])
