import importlib
import math

import numpy as np
import pytest
import torch

from hvdlocal.data.augment import CenterCrop, RandomResizedCrop
from hvdlocal.data.augment.base import RESIZED_CROP, uniforms
from hvdlocal.data.random_keys import sample_keys
from hvdlocal.models.torchvision_import import import_torchvision

KEYS = sample_keys(4, np.zeros(4000, np.int64), np.arange(4000))


def dims_of(height, width, n=4000):
    return np.tile(np.array([[height, width]], np.uint16), (n, 1))


def noise(n, height, width, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, (n, height, width, 3)).astype(np.uint8))


def smooth(height, width):
    """One image of waves, as an image of the world is smoother than noise."""
    y, x, c = np.mgrid[:height, :width, :3]
    return torch.from_numpy((127.5 + 127.5 * np.sin(y / 9 + x / 5 + c)).astype(np.uint8))[None]


def torchvision_functional():
    import_torchvision()
    return importlib.import_module("torchvision.transforms.v2.functional")


def torchvision_box(height, width, draws, scale, ratio):
    """What RandomResizedCrop.get_params of torchvision gives with our random numbers."""
    for area, aspect in zip(draws[:10], draws[10:20], strict=True):
        target = height * width * (scale[0] + area * (scale[1] - scale[0]))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect_ratio = math.exp(low + aspect * (high - low))
        w, h = round(math.sqrt(target * aspect_ratio)), round(math.sqrt(target / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return [int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w]
    in_ratio = width / height
    if in_ratio < min(ratio):
        w, h = width, round(width / min(ratio))
    elif in_ratio > max(ratio):
        w, h = round(height * max(ratio)), height
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (500, 333), (32, 32), (1, 1), (3, 2), (40, 2000), (3000, 7), (65535, 65535)]
)
@pytest.mark.parametrize(("scale", "ratio"), [((0.08, 1), (3 / 4, 4 / 3)), ((0.9, 1), (0.5, 0.6)), ((1, 1), (1, 1))])
def test_boxes_are_torchvisions(height, width, scale, ratio):
    found = RandomResizedCrop(224, scale, ratio).boxes(dims_of(height, width, 200), KEYS[:200])
    draws = uniforms(KEYS[:200], RESIZED_CROP, 22)
    assert found.tolist() == [torchvision_box(height, width, row, scale, ratio) for row in draws.tolist()]


@pytest.mark.parametrize(("height", "width"), [(375, 500), (5, 4), (1, 1), (1, 9), (2000, 3)])
def test_boxes_lie_inside(height, width):
    for crop in (
        RandomResizedCrop(224),
        RandomResizedCrop(8, (0.5, 0.6), (5, 6)),
        CenterCrop(224, 256),
        CenterCrop(7, 7),
    ):
        boxes = crop.boxes(dims_of(height, width), KEYS)
        assert boxes.dtype == np.int64
        top, left, box_height, box_width = boxes.T
        assert min(top.min(), left.min()) >= 0
        assert min(box_height.min(), box_width.min()) >= 1
        assert (top + box_height).max() <= height
        assert (left + box_width).max() <= width


def kolmogorov(sample, distribution):
    """Largest distance between the sample's distribution and a given one, times sqrt(n): below 2.2 but for 1 in 8000."""
    expected = distribution(np.sort(sample))
    steps = np.arange(len(sample) + 1) / len(sample)
    distance = max(np.abs(steps[1:] - expected).max(), np.abs(steps[:-1] - expected).max())
    return distance * math.sqrt(len(sample))


def test_boxes_are_distributed_as_they_should():
    # So large an image that rounding does not show, and so small a scale that nothing is ever rejected.
    side, scale, ratio = 60_000, (0.08, 0.5), (3 / 4, 4 / 3)
    top, left, height, width = RandomResizedCrop(224, scale, ratio).boxes(dims_of(side, side), KEYS).T
    area, aspect = height * width / side**2, np.log(width / height)
    assert kolmogorov(area, lambda a: (a - 0.08) / 0.42) < 2.2
    assert kolmogorov(aspect, lambda r: (r - math.log(3 / 4)) / math.log(16 / 9)) < 2.2
    assert kolmogorov(top / (side - height), lambda u: u) < 2.2
    assert kolmogorov(left / (side - width), lambda u: u) < 2.2
    correlation = np.corrcoef(np.stack([area, aspect, top / (side - height), left / (side - width)]))
    assert np.abs(correlation - np.eye(4)).max() < 5 / math.sqrt(len(KEYS))


def test_boxes_depend_on_their_own_key_only():
    dims = np.random.RandomState(0).randint(1, 600, (100, 2)).astype(np.uint16)
    whole = RandomResizedCrop(224).boxes(dims, KEYS[:100])
    chosen = np.array([7, 93, 7, 20])
    np.testing.assert_array_equal(RandomResizedCrop(224).boxes(dims[chosen], KEYS[chosen]), whole[chosen])


def test_golden_boxes():
    found = RandomResizedCrop(224).boxes(dims_of(375, 500, 3), KEYS[:3])
    assert found.tolist() == [[9, 74, 363, 395], [129, 207, 190, 148], [34, 24, 337, 436]]


@pytest.mark.parametrize("n", [0, 1])
def test_empty_and_single(n):
    for crop in (RandomResizedCrop(6), CenterCrop(6, 8)):
        assert crop.boxes(dims_of(9, 11, n), KEYS[:n]).shape == (n, 4)
        assert crop(noise(n, 9, 11), KEYS[:n]).shape == (n, 6, 6, 3)


@pytest.mark.parametrize("size", [8, 24, 32, 50])
def test_resizing_is_torchvisions(size):
    functional = torchvision_functional()
    images, crop = torch.cat([noise(20, 24, 36), smooth(24, 36)]), RandomResizedCrop(size)
    found = crop(images, KEYS[:21])
    for image, result, (top, left, height, width) in zip(
        images, found, crop.boxes(dims_of(24, 36, 21), KEYS[:21]).tolist(), strict=True
    ):
        part = image.permute(2, 0, 1)[:, top : top + height, left : left + width].float()
        expected = functional.resize(part, [size, size], antialias=True).permute(1, 2, 0)
        assert result.dtype == torch.uint8
        assert float((result - expected).abs().max()) < 0.5 + 1e-3  # rounded, and otherwise the same


@pytest.mark.parametrize(
    ("height", "width", "size", "resize"),
    [(32, 32, 28, 32), (40, 60, 24, 28), (60, 40, 24, 28), (41, 57, 32, 37), (20, 30, 24, 27), (33, 50, 20, 20)],
)
def test_center_crop_is_torchvisions(height, width, size, resize):
    functional = torchvision_functional()
    images = torch.cat([noise(3, height, width), smooth(height, width)])
    resized = functional.resize(images.permute(0, 3, 1, 2).float(), [resize], antialias=True)
    expected = functional.center_crop(resized, [size, size]).permute(0, 2, 3, 1)
    found = CenterCrop(size, resize)(images)
    assert found.dtype == torch.uint8
    assert float((found - expected).abs().max()) < 0.5 + 1e-3


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (333, 500), (1024, 2048), (256, 256)])
def test_center_boxes_are_torchvisions_to_the_pixel(height, width):
    (box,) = CenterCrop(224, 256).boxes(dims_of(height, width, 1)).tolist()
    short = min(height, width)
    resized = [256 * height // short, 256 * width // short]
    for axis, side in enumerate((height, width)):
        pixel = side / resized[axis]  # of the resized image, in pixels of the original
        assert abs(box[axis] - round((resized[axis] - 224) / 2) * pixel) <= 0.5
        assert abs(box[axis + 2] - 224 * pixel) <= 0.5


def test_unfit_arguments_are_refused():
    with pytest.raises(ValueError, match="size is 0"):
        RandomResizedCrop(0)
    with pytest.raises(ValueError, match=r"scale is \(0, 1\)"):
        RandomResizedCrop(8, (0, 1))
    with pytest.raises(ValueError, match="scale is"):
        RandomResizedCrop(8, (0.5, 1.5))
    with pytest.raises(ValueError, match="ratio is"):
        RandomResizedCrop(8, ratio=(2, 1))
    with pytest.raises(ValueError, match="resize is 200, less than the size 224"):
        CenterCrop(224, 200)
    with pytest.raises(ValueError, match="size is -1"):
        CenterCrop(-1, 5)
    with pytest.raises(ValueError, match=r"images are torch\.float32"):
        RandomResizedCrop(8)(noise(2, 9, 9).float(), KEYS[:2])
