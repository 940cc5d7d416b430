"""A fixed part of the training images as they are, over which a loss is looked at more closely."""

from __future__ import annotations

import torch
from torch import Tensor

from hvdlocal.data import ShardedDataset, evaluation_batches
from hvdlocal.training.preprocessing import Preprocessing

BATCH = 500


def first_images(
    data: ShardedDataset, images: Preprocessing, number: int, device: str | torch.device = "cpu"
) -> list[tuple[Tensor, Tensor]]:
    """The first images of a data set, whose order on disk is random, in batches: cut like test images, not augmented."""
    batches: list[tuple[Tensor, Tensor]] = []
    crop, transform = images.test_crop, images.test_transform
    for batch in evaluation_batches(data, BATCH, crop=crop, transform=transform, device=device):
        batches.append(batch)
        if len(batches) * BATCH >= number:
            break
    return batches
