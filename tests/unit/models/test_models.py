"""The registry's models have the published sizes and take the images they say."""

import pytest
import torch

from hvdlocal.models import MODELS, build_model

# Parameters: torchvision's documentation for 1,000 classes; Balles et al. and the original papers for the CIFAR networks.
SIZES = [
    ("digits_cnn", 10, (8, 8, 1), 16_202),
    ("small_cnn", 10, (16, 16, 3), 29_642),
    ("resnet9", 10, (32, 32, 3), 6_573_130),
    ("resnet9_narrow", 10, (32, 32, 3), 412_954),
    ("resnet18_cifar", 10, (32, 32, 3), 11_173_962),
    ("wrn_28_2", 10, (32, 32, 3), 1_467_610),
    ("resnet50", 1000, (224, 224, 3), 25_557_032),
    ("resnet152", 1000, (224, 224, 3), 60_192_808),
    ("vit_b_16", 1000, (224, 224, 3), 86_567_656),
]


@pytest.mark.parametrize(("name", "num_classes", "shape", "parameters"), SIZES, ids=[s[0] for s in SIZES])
def test_number_of_parameters(name, num_classes, shape, parameters):
    with torch.device("meta"):
        model = build_model(name, num_classes, shape)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_table_covers_the_registry():
    assert {name for name, *_ in SIZES} == set(MODELS)


@pytest.mark.parametrize(
    ("name", "shape"), [("digits_cnn", (8, 8, 1)), ("resnet9_narrow", (32, 32, 3)), ("wrn_28_2", (32, 32, 3))]
)
def test_forward(name, shape):
    height, width, channels = shape
    logits = build_model(name, 7, shape)(torch.zeros(2, channels, height, width))
    assert logits.shape == (2, 7)


def test_vit_takes_the_image_size():
    with torch.device("meta"):
        model = build_model("vit_b_16", 5, (32, 32, 3))
    assert model.image_size == 32


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("resnet5O", (224, 224, 3), "did you mean 'resnet50'"),
        ("resnet50", (224, 224, 1), "3 channels, not 1"),
        ("vit_b_16", (30, 32, 3), "multiple of 16, not 30×32"),
    ],
)
def test_refusals(name, shape, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, 10, shape)
