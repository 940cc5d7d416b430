"""What is cut out of training and test images: by default nothing is thrown away where images have the size already."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hvdlocal.cli.configuration import parse
from hvdlocal.data import (
    CenterCrop,
    Compose,
    JpegShardWriter,
    RandomResizedCrop,
    ShardedDataset,
    ShardWriter,
    evaluation_batches,
)
from hvdlocal.training.config import DataConfig
from hvdlocal.training.preprocessing import preprocessing_from_config

EXPERIMENTS = Path(__file__).parents[3] / "experiments"


def fixed(height, width):
    return SimpleNamespace(
        kind="images", shape=(height, width, 3), dims=None, mean=(0.5,) * 3, std=(0.2,) * 3, num_classes=2
    )


def jpegs(*sides):
    dims = np.array(sides, np.uint16)
    return SimpleNamespace(kind="jpeg", shape=None, dims=dims, mean=(0.5,) * 3, std=(0.2,) * 3, num_classes=2)


def cuts(config, data, test_data=None):
    """(smallest share of a training crop, side of a test image before the central crop)."""
    images = preprocessing_from_config(config, data, test_data)
    if images.crop is None:
        assert isinstance(images.transform, Compose)
        crop, center = images.transform.transforms[0], images.test_transform.transforms[0]
    else:
        crop, center = images.crop, images.test_crop
    assert isinstance(crop, RandomResizedCrop)
    assert isinstance(center, CenterCrop)
    assert (crop.size, center.size, crop.scale[1]) == (config.image_size, config.image_size, 1.0)
    return crop.scale[0], center.resize


@pytest.mark.parametrize(
    ("data", "size", "expected"),
    [
        (fixed(28, 28), 28, (0.25, 28)),
        (fixed(28, 28), 32, (0.25, 32)),
        (fixed(28, 40), 28, (0.25, 28)),
        (fixed(32, 32), 28, (0.08, 32)),
        (fixed(256, 320), 224, (0.08, 256)),
        (jpegs((28, 28), (28, 28), (28, 28)), 28, (0.25, 28)),
        (jpegs((28, 28), (28, 28), (60, 60)), 28, (0.25, 28)),
        (jpegs((375, 500), (500, 333), (100, 100)), 224, (0.08, 256)),
        (jpegs((256, 341)), 224, (0.08, 256)),
        (jpegs((224, 500), (225, 500)), 224, (0.08, 256)),
    ],
)
def test_the_default(data, size, expected):
    assert cuts(DataConfig("data", image_size=size), data) == expected


def test_test_images_decide_about_themselves():
    config = DataConfig("data", image_size=224)
    assert cuts(config, jpegs((375, 500)), jpegs((224, 224))) == (0.08, 224)
    assert cuts(config, jpegs((224, 224)), jpegs((375, 500))) == (0.25, 256)


@pytest.mark.parametrize(("test_crop", "resize"), [(1.0, 224), (0.875, 256), (0.95, 236), (0.5, 448), (0.999, 224)])
def test_settings_win(test_crop, resize):
    config = DataConfig("data", image_size=224, min_area=0.3, test_crop=test_crop)
    for data in (fixed(224, 224), jpegs((375, 500))):
        assert cuts(config, data) == (0.3, resize)


@pytest.mark.parametrize(
    ("settings", "kept"), [({}, "testing the whole image"), ({"test_crop": 0.875}, "the central 87.5 % of each side")]
)
def test_it_is_said(settings, kept):
    description = preprocessing_from_config(DataConfig("data", image_size=28, **settings), fixed(28, 28)).description
    assert description.startswith(
        "brought to 28 pixels; training takes random crops of 25 to 100 % of the area, testing"
    )
    assert description.endswith(kept)
    assert preprocessing_from_config(DataConfig("data"), fixed(28, 28)).description == ""


@pytest.mark.parametrize("data", [fixed(28, 40), jpegs((28, 40))])
def test_of_an_oblong_image_a_square_is_tested(data):
    description = preprocessing_from_config(DataConfig("data", image_size=28), data).description
    assert description.endswith("testing the largest central square")


def seen(data, config):
    """The test images as a model sees them, back in units of a pixel."""
    images = preprocessing_from_config(config, data)
    (batch,) = (x for x, _ in evaluation_batches(data, 10, crop=images.test_crop, transform=images.test_transform))
    mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (data.mean, data.std))
    return np.rint((batch.numpy() * std + mean) * 255)


def test_images_that_have_the_size_are_seen_as_they_are(tmp_path):
    simplejpeg = pytest.importorskip("simplejpeg")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 28, 28, 3), dtype=np.uint8)
    ShardWriter(tmp_path / "raw", "test", classes=["a"]).write(pixels, np.zeros(10, int))
    files = [simplejpeg.encode_jpeg(image, 95, "RGB", "420") for image in pixels]
    JpegShardWriter(tmp_path / "jpeg", "test", classes=["a"]).write(files, np.zeros(10, int))
    for kind, wanted in (("raw", pixels), ("jpeg", np.stack([simplejpeg.decode_jpeg(file) for file in files]))):
        data = ShardedDataset(tmp_path / kind, "test")
        found = seen(data, DataConfig("data", image_size=28))
        np.testing.assert_array_equal(found, wanted[data.index].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("name", ["imagenet_resnet50", "qsr_resnet152", "qsr_vit_b16"])
def test_published_settings(name):
    config = parse([str(EXPERIMENTS / f"{name}.yaml")]).data
    for data in (jpegs((375, 500)), jpegs((224, 224))):
        assert cuts(config, data) == (0.08, 256)
