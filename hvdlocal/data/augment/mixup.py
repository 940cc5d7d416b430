"""Mixing pairs of samples."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hvdlocal.data.augment.base import MIXUP, check_keys, uniforms
from hvdlocal.data.buffer_pool import BufferPool


class MixUp:
    """λ times each sample plus 1-λ times the one before it in the batch (Zhang et al., ICLR 2018), labels alike.

    λ ~ Beta(alpha, alpha) is one number per batch, and the partner is the batch rolled by one, as in torchvision's
    reference scripts. λ comes from the key of the first sample; the partners are those of the rank's own batch, so
    that, other than the transforms, mixing changes with the number of workers.

    Args:
        alpha: small values mix little, 1 makes λ uniform; 0.2 is usual for ImageNet.
        num_classes: width of the labels.
    """

    def __init__(self, alpha: float, num_classes: int) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha}; it must be positive (leave MixUp out to mix nothing)")
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; there must be at least one")
        self.alpha = alpha
        self.num_classes = num_classes
        self._buffers = BufferPool()

    def __call__(self, images: Tensor, labels: Tensor, keys: NDArray[np.uint64]) -> tuple[Tensor, Tensor]:
        """Mixes floating-point (n, C, H, W) images and int64 (n,) labels; returns new images of the same type, and
        float32 (n, num_classes) labels.
        """
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; MixUp needs floating-point images, as Normalize makes them")
        ratio = self._ratio(check_keys(keys, len(images)))
        return self._mix(images, ratio), self._mix(F.one_hot(labels, self.num_classes).float(), ratio)

    def _ratio(self, keys: NDArray[np.uint64]) -> float:
        return float(symmetric_beta(self.alpha, uniforms(keys[:1], MIXUP, 2))[0]) if len(keys) else 1.0

    def _mix(self, values: Tensor, ratio: float) -> Tensor:
        if values.device.type == "cpu":
            mixed = torch.mul(values, ratio, out=self._buffers.empty(values.shape, values.dtype))
        else:
            mixed = values * ratio
        mixed[1:].add_(values[:-1], alpha=1 - ratio)
        mixed[:1].add_(values[-1:], alpha=1 - ratio)
        return mixed


def symmetric_beta(alpha: float, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """Beta(alpha, alpha) variates (n,), one from each pair of uniforms (n, 2) in [0, 1).

    Bailey's polar method (Math. Comp. 62, 1994) makes a Student variate T with 2 alpha degrees of freedom, and
    1/2 + T / (2 sqrt(2 alpha + T²)) is Beta(alpha, alpha) (Devroye, WSC 1996). One formula for every alpha, with no
    rejection, so that each variate takes the same two numbers.
    """
    cosine = np.cos(2 * np.pi * uniform[:, 1])
    with np.errstate(over="ignore"):  # with a small alpha T² often leaves the range of floats, and λ is 0 or 1
        square = np.expm1(-np.log1p(-uniform[:, 0]) / alpha) * cosine**2  # T² / (2 alpha)
    return (1 + np.sign(cosine) * np.sqrt(1 - 1 / (1 + square))) / 2
