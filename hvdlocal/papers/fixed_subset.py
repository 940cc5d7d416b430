"""A fixed subset of the training images, without augmentation, on which a loss is examined."""

from __future__ import annotations

import torch
from torch import Tensor

from hvdlocal.data import evaluation_batches
from hvdlocal.data.read.dataset import StoredSamples
from hvdlocal.training.preprocessing import Preprocessing

BATCH = 500
"""Images per batch."""


def first_images(
    data: StoredSamples, images: Preprocessing, number: int, device: str | torch.device = "cpu"
) -> list[tuple[Tensor, Tensor]]:
    """Returns the first images of a data set in batches, cropped like test images and not augmented.

    The order on disk is random, so that these images are a random sample.
    """
    batches: list[tuple[Tensor, Tensor]] = []
    crop, transform = images.test_crop, images.test_transform
    for batch in evaluation_batches(data, BATCH, crop=crop, transform=transform, device=device):
        batches.append(batch)
        if len(batches) * BATCH >= number:
            break
    return batches
