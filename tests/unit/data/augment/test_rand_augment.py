import importlib

import numpy as np
import pytest
import torch

from hvdlocal.data.augment import RandAugment
from hvdlocal.data.augment.base import RAND_AUGMENT, uniforms
from hvdlocal.data.augment.rand_augment import OPERATIONS
from hvdlocal.data.random_keys import sample_keys
from hvdlocal.models.torchvision_import import import_torchvision

EXACT = [name for name in OPERATIONS if name not in ("ShearX", "ShearY", "Rotate")]


def keys_of(n, seed=0):
    return sample_keys(seed, np.zeros(n, np.int64), np.arange(n))


def images_of(n, height=32, width=24, channels=3):
    """Noise, and images with few values, one value, and a narrow range of them."""
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (n, height, width, channels))
    images[1::5] = images[1::5] // 100 * 100
    images[2::5] = 77
    images[3::5] = 90 + images[3::5] // 8
    return torch.from_numpy(images.astype(np.uint8))


def torchvision_operation(name, images, magnitude, sign):
    """What torchvision's RandAugment does for an operation."""
    import_torchvision()
    v2 = importlib.import_module("torchvision.transforms.v2")
    reference = v2.RandAugment()
    strengths, signed = reference._AUGMENTATION_SPACE[name]
    values = strengths(31, *images.shape[1:3])
    value = 0.0 if values is None else float(values[magnitude]) * (sign if signed else 1)
    found = [
        reference._apply_image_or_video_transform(image, name, value, v2.InterpolationMode.NEAREST, {})
        for image in images.permute(0, 3, 1, 2)
    ]
    return torch.stack(found).permute(0, 2, 3, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("name", EXACT)
def test_operations_are_torchvisions(name, magnitude, channels):
    images = images_of(10, channels=channels)
    for sign in (1, -1):
        found = RandAugment(2, magnitude).apply(name, sign, images)
        expected = torchvision_operation(name, images, magnitude, sign)
        assert torch.equal(found, expected), (found.int() - expected.int()).abs().max()


@pytest.mark.parametrize(("height", "width"), [(32, 24), (31, 47), (224, 224), (1, 5)])
@pytest.mark.parametrize("magnitude", [1, 9, 30])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "Rotate"])
def test_warps_are_torchvisions(name, magnitude, height, width):
    # Each pixel tells where it comes from; 0 is outside.
    y, x = np.mgrid[:height, :width] + 1
    images = torch.from_numpy(np.stack([y, x, y // 256 + x // 256], 2).astype(np.uint8))[None]
    for sign in (1, -1):
        found = RandAugment(2, magnitude).apply(name, sign, images)
        expected = torchvision_operation(name, images, magnitude, sign)
        # torchvision's coordinates are float32: points half-way between two pixels may fall on either side.
        assert float((found != expected).any(3).float().mean()) < 4e-3


def test_known_results():
    image = torch.tensor([[[10], [20], [30]], [[40], [50], [60]], [[70], [80], [255]]], dtype=torch.uint8)[None]
    strongest = RandAugment(1, 30)

    def found(name, sign=1):
        return strongest.apply(name, sign, image)[0, :, :, 0].tolist()

    assert found("Identity") == [[10, 20, 30], [40, 50, 60], [70, 80, 255]]
    assert found("TranslateX") == [[0, 10, 20], [0, 40, 50], [0, 70, 80]]  # int(3 * 150 / 331) = 1 pixel to the right
    assert found("TranslateX", -1) == [[20, 30, 0], [50, 60, 0], [80, 255, 0]]
    assert found("TranslateY") == [[0, 0, 0], [10, 20, 30], [40, 50, 60]]
    assert found("Brightness") == [[19, 38, 57], [76, 95, 114], [133, 152, 255]]
    assert found("Posterize") == [[0, 16, 16], [32, 48, 48], [64, 80, 240]]  # 4 bits
    assert found("Solarize") == [[245, 235, 225], [215, 205, 195], [185, 175, 0]]
    assert found("AutoContrast")[0] == [0, 10, 20]
    assert found("AutoContrast")[2] == [62, 72, 254]  # 254.99998 before it is cut to an integer, also in torchvision
    assert found("Equalize") == [[10, 20, 30], [40, 50, 60], [70, 80, 255]]  # too few pixels: Pillow leaves them
    # The middle is drawn away from (sum of all + 4 * middle) / 13 = 62 (615 + 200 = 815; 815 / 13 = 62.7 -> 63).
    assert found("Sharpness")[1] == [40, int(50 - 0.9 * (63 - 50)), 60]
    assert found("Sharpness")[0] == [10, 20, 30]


def test_operations_are_drawn_evenly():
    draws = uniforms(keys_of(14_000), RAND_AUGMENT, 4)
    for turn in (0, 2):
        counts = np.bincount((draws[:, turn] * 14).astype(int), minlength=14)
        assert np.abs(counts - 1000).max() < 5 * 1000**0.5
    joint = np.histogram2d(draws[:, 0], draws[:, 2], bins=14, range=[[0, 1], [0, 1]])[0]
    expected = 14_000 / 196
    assert ((joint - expected) ** 2 / expected).sum() < 195 + 5 * (2 * 195) ** 0.5


@pytest.mark.parametrize("num_ops", [0, 1, 3])
def test_images_go_through_what_they_drew(num_ops):
    images, keys, transform = images_of(60), keys_of(60, 5), RandAugment(num_ops, 14)
    draws = uniforms(keys, RAND_AUGMENT, 2 * num_ops)
    expected = []
    for image, row in zip(images, draws, strict=True):
        for turn in range(num_ops):
            sign = -1 if row[2 * turn + 1] < 0.5 else 1
            image = transform.apply(OPERATIONS[int(row[2 * turn] * 14)], sign, image[None])[0]
        expected.append(image)
    assert torch.equal(transform(images, keys), torch.stack(expected))


def test_tiny_images():
    for height, width in ((1, 1), (2, 5), (5, 2), (0, 4)):
        images = images_of(60, height, width)
        assert RandAugment(3, 30)(images, keys_of(60)).shape == images.shape


def test_unfit_arguments_are_refused():
    with pytest.raises(ValueError, match="num_ops is -1"):
        RandAugment(-1)
    with pytest.raises(ValueError, match=r"magnitude is 31; it must lie in 0\.\.30"):
        RandAugment(2, 31)
    with pytest.raises(ValueError, match="images have 4 channels; 1 or 3 are needed"):
        RandAugment()(images_of(2, channels=4), keys_of(2))
