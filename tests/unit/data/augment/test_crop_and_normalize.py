import hashlib
import pickle

import numpy as np
import pytest
import torch

from hvdlocal.data.augment import Compose, CropFlip, Flip, Normalize, RandAugment, RandomResizedCrop
from hvdlocal.data.augment.base import FLIP, MIXUP, RAND_AUGMENT, RESIZED_CROP, uniforms
from hvdlocal.data.random_keys import sample_keys, splitmix64

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


@pytest.mark.parametrize("padding", [0, 3, 9])
@pytest.mark.parametrize("shape", [(40, 8, 6, 3), (17, 5, 5, 1), (1, 1, 1, 2), (0, 8, 6, 3)])
def test_cpu_and_accelerators_crop_alike(shape, padding):
    n, height, width, channels = shape
    images = images_of(n, height, width, channels)
    transform = CropFlip((0.0,) * channels, (1.0,) * channels, padding=padding)
    draw = transform._draw(keys_of(n))
    on_device = transform._on_device(images, *draw)
    assert on_device.shape == (n, channels, height, width)
    assert torch.equal(transform._on_cpu(images, *draw), on_device)
    # And both do what slicing does.
    padded = np.pad(images.numpy(), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    for image, source, top, left, mirrored in zip(on_device.numpy(), padded, *draw, strict=True):
        expected = source[top : top + height, left : left + width]
        np.testing.assert_array_equal(image.transpose(1, 2, 0), expected[:, ::-1] if mirrored else expected)


def test_results_that_are_held_stay_as_they_are():
    images, transform = images_of(300, 16, 16), CropFlip((0.5,) * 3, (0.2,) * 3)
    held = [transform(images, keys_of(300, seed)) for seed in range(10)]
    for seed, batch in enumerate(held):
        assert torch.equal(batch, CropFlip((0.5,) * 3, (0.2,) * 3)(images, keys_of(300, seed)))


def test_flip():
    images, keys = images_of(400), keys_of(400)
    found = Flip()(images, keys)
    mirrored = torch.from_numpy(uniforms(keys, FLIP, 1)[:, 0] < 0.5)
    assert abs(int(mirrored.sum()) - 200) < 50  # five standard deviations
    assert torch.equal(found[mirrored], images[mirrored].flip(2))
    assert torch.equal(found[~mirrored], images[~mirrored])


def test_compose():
    images, keys, normalize = images_of(30), keys_of(30), Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert torch.equal(Compose([Flip(), normalize])(images, keys), normalize(Flip()(images, keys)))
    assert torch.equal(Compose([])(images, keys), images)


def test_draws_are_the_generator_that_starts_at_the_key():
    keys = np.array([5, 2**64 - 1], np.uint64)
    found = uniforms(keys, 3, 4)
    for key, row in zip(keys.tolist(), found, strict=True):
        for i, value in enumerate(row):
            state = np.array([(key + (3 + i) * 0x9E3779B97F4A7C15) % 2**64], np.uint64)
            assert value == (int(splitmix64(state)[0]) >> 11) / 2**53
    assert found.max() < 1
    assert found.min() >= 0


def test_kinds_of_augmentation_draw_independently():
    draws = np.concatenate(
        [uniforms(keys_of(20_000), first, 2) for first in (FLIP, RESIZED_CROP, RAND_AUGMENT, MIXUP)], 1
    )
    # Correlations of 20,000 independent pairs have a standard deviation of 0.007.
    assert np.abs(np.corrcoef(draws.T) - np.eye(8)).max() < 0.035
    assert np.abs(draws.mean(0) - 0.5).max() < 5 * 12**-0.5 / 20_000**0.5


TRANSFORMS = [
    CropFlip((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
    Flip(),
    RandomResizedCrop(5),
    RandAugment(num_ops=3, magnitude=12),
    Compose([Flip(), RandAugment(), RandomResizedCrop(7), Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))]),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: type(transform).__name__)
def test_empty_batch(transform):
    assert len(transform(images_of(0), keys_of(0))) == 0


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: type(transform).__name__)
def test_copies_of_transforms_do_the_same(transform):
    images, keys = images_of(20), keys_of(20)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(images, keys), transform(images, keys))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: type(transform).__name__)
def test_gpu_does_the_same(transform):
    images, keys = images_of(200, 24, 24), keys_of(200)
    on_gpu = transform(images.cuda(), keys)
    assert on_gpu.is_cuda
    found, expected = on_gpu.cpu().double(), transform(images, keys).double()
    # Resizing rounds sums of floats, whose last bits depend on their order: one unit in a few pixels.
    unit = 1.001 if expected.max() > 10 else 1.001 / 255 / 0.2
    assert float((found - expected).abs().max()) <= unit
    assert float((found != expected).double().mean()) < 1e-2
    assert len(transform(images[:0].cuda(), keys[:0])) == 0


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: type(transform).__name__)
def test_each_image_depends_on_its_own_key_only(transform):
    images, keys = images_of(50), keys_of(50)
    whole = transform(images, keys)
    chosen = np.array([41, 3, 17, 3])
    assert torch.equal(transform(images[chosen], keys[chosen]), whole[chosen])


def test_without_padding_and_flip_nothing_moves():
    images = images_of(20)
    assert torch.equal(
        CropFlip(**PIXELS, padding=0, flip=False)(images, keys_of(20)), images.permute(0, 3, 1, 2).float()
    )


@pytest.mark.parametrize(
    "transform", [*TRANSFORMS, Normalize(**PIXELS)], ids=lambda transform: type(transform).__name__
)
def test_input_is_not_changed(transform):
    images = images_of(20)
    before = images.clone()
    transform(images, keys_of(20))
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
    for transform in TRANSFORMS:
        with pytest.raises(ValueError, match="one key per image"):
            transform(images_of(3), keys_of(2))
