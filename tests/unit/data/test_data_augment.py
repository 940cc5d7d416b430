import hashlib

import numpy as np
import pytest
import torch

from hvdlocal.data import CropFlip, Normalize
from hvdlocal.data.keys import sample_keys

PIXELS = {"mean": (0, 0, 0), "std": (1 / 255,) * 3}  # leaves pixel values as they are


def images_of(n, height=8, width=6, channels=3):
    rng = np.random.RandomState(0)
    return torch.from_numpy(rng.randint(1, 256, (n, height, width, channels)).astype(np.uint8))


def keys_of(n, seed=0):
    return sample_keys(seed, np.zeros(n, np.int64), np.arange(n))


def test_normalize():
    images = images_of(5)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    found = Normalize(mean, std)(images)
    expected = (images.double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected.permute(0, 3, 1, 2).float(), rtol=1e-5, atol=1e-5)


def test_every_output_is_one_of_the_crops():
    padding, images = 2, images_of(400)
    found = CropFlip(**PIXELS, padding=padding)(images, keys_of(400)).numpy()
    padded = np.pad(images.numpy(), ((0, 0), (padding, padding), (padding, padding), (0, 0))).transpose(0, 3, 1, 2)
    counts = np.zeros((5, 5, 2), int)
    for image, source in zip(found, padded, strict=True):
        matches = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in range(2)
            if np.array_equal(image[..., ::-1] if mirrored else image, source[:, top : top + 8, left : left + 6])
        ]
        assert len(matches) == 1
        counts[matches[0]] += 1
    # 400 draws: 80 of each offset and 200 flips are due; bounds are five standard deviations.
    for axes in ((1, 2), (0, 2)):
        assert np.abs(counts.sum(axes) - 80).max() < 40
    assert abs(counts[..., 1].sum() - 200) < 50


def test_golden_crops():
    # The augmentation of a sample belongs to the reproducibility of a run: it must not change unnoticed.
    found = CropFlip(**PIXELS)(images_of(64, 32, 32), keys_of(64, seed=1)).numpy().astype(np.uint8)
    assert (
        hashlib.sha256(found.tobytes()).hexdigest()
        == "067966ecc0a12f27851080ff0138a7e83ca25fe6a104c8fbf1734f7ebb27da01"
    )


def test_each_image_depends_on_its_own_key_only():
    images, keys = images_of(50), keys_of(50)
    transform = CropFlip((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    whole = transform(images, keys)
    chosen = np.array([41, 3, 17, 3])
    assert torch.equal(transform(images[chosen], keys[chosen]), whole[chosen])


def test_without_padding_and_flip_nothing_moves():
    images = images_of(20)
    assert torch.equal(
        CropFlip(**PIXELS, padding=0, flip=False)(images, keys_of(20)), images.permute(0, 3, 1, 2).float()
    )


def test_input_is_not_changed():
    images = images_of(20)
    before = images.clone()
    CropFlip(**PIXELS)(images, keys_of(20))
    Normalize(**PIXELS)(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("num_channels", [1, 4])
def test_wrong_images_are_refused(num_channels):
    with pytest.raises(ValueError, match=f"with {num_channels} channels"):
        CropFlip(**PIXELS)(images_of(2, channels=num_channels), keys_of(2))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        Normalize(**PIXELS)(images_of(2).float())


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="every std must be positive"):
        Normalize((0.5,), (0.0,))
    with pytest.raises(ValueError, match="one number per channel"):
        Normalize((0.5,), (0.1, 0.1))
    with pytest.raises(ValueError, match="padding is -1"):
        CropFlip(**PIXELS, padding=-1)
    with pytest.raises(ValueError, match="one key per image"):
        CropFlip(**PIXELS)(images_of(3), keys_of(2))
