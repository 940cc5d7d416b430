"""A loader's batches are the same, wherever they are augmented."""

import numpy as np
import pytest
import torch

from hvdlocal import Loader, ShardedDataset, ShardWriter
from hvdlocal.data import (
    CenterCrop,
    Compose,
    CropFlip,
    Flip,
    MixUp,
    Normalize,
    RandAugment,
    RandomResizedCrop,
    evaluation_batches,
)
from hvdlocal.data.augment import crop

PIXELS = (0.5, 0.4, 0.6), (0.2, 0.25, 0.3)
# Resizing, blending and mixing round sums of floats, whose last bits depend on their order: one unit in a few pixels.
TRANSFORMS = {
    "crop and flip": (CropFlip(*PIXELS), None, 0.0),
    "flip": (Compose([Flip(), Normalize(*PIXELS)]), None, 0.0),
    "random resized crop": (Compose([RandomResizedCrop(12), Flip(), Normalize(*PIXELS)]), None, 0.01),
    "RandAugment": (Compose([RandAugment(1, 12), Normalize(*PIXELS)]), None, 0.01),
    "MixUp": (CropFlip(*PIXELS), MixUp(0.2, 3), 1.0),
}
UNIT = 1.01 / 255 / 0.2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    images = np.random.default_rng(0).integers(0, 256, (90, 16, 16, 3), dtype=np.uint8)
    ShardWriter(directory, "train", classes=["a", "b", "c"]).write(images, np.arange(90) % 3)
    return ShardedDataset(directory)


@pytest.mark.parametrize("kernel", [True, False], ids=["", "without the kernel"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_batches_augmented_on_the_device_equal_those_of_the_cpu(device, dataset, monkeypatch, name, kernel):
    if not kernel:
        monkeypatch.setattr(crop, "_kernel", lambda device: None)
    transform, mix, few = TRANSFORMS[name]
    settings = {"transform": transform, "mix": mix, "threads": 2, "seed": 3}
    on_cpu, on_device = (Loader(dataset, 32, device=where, **settings).endless() for where in ("cpu", device))
    for _ in range(6):
        (images, labels), (device_images, device_labels) = next(on_cpu), next(on_device)
        assert device_images.device == device
        assert device_labels.device == device
        difference = (device_images.cpu() - images).abs()
        if mix is None:
            assert float(difference.max()) <= (UNIT if few else 0)
            assert float((difference > 0).double().mean()) <= few
        else:
            torch.testing.assert_close(device_images.cpu(), images)
        torch.testing.assert_close(device_labels.cpu(), labels)


def test_the_kernel_is_used_where_it_can_be(device):
    if device.type == "cpu":
        pytest.skip("the kernel is for CUDA")
    pytest.importorskip("triton")
    assert crop._kernel(device) is not None


def test_evaluation_batches(device, dataset):
    transform = Compose([CenterCrop(12, 14), Normalize(*PIXELS)])
    on_cpu, on_device = (
        list(evaluation_batches(dataset, 40, transform=transform, device=where)) for where in ("cpu", device)
    )
    for (images, labels), (device_images, device_labels) in zip(on_cpu, on_device, strict=True):
        assert float((device_images.cpu() - images).abs().max()) <= UNIT
        assert torch.equal(device_labels.cpu(), labels)
