"""The registry's models have the published sizes and take the images they say."""

import pytest
import torch

from hvdlocal.models import MODELS, build_model, check_images

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


SMALLEST = {"digits_cnn": 4, "small_cnn": 4, "resnet9": 8, "resnet9_narrow": 8, "vit_b_16": 16}
"""Side of the smallest images that a model can be trained on; the others, without pooling of a fixed size, take any."""


@pytest.mark.parametrize("name", MODELS)
def test_images_that_are_too_small(name):
    smallest = SMALLEST.get(name, 1)
    check_images(name, 10, (smallest, smallest, 3), 2)
    for side in range(1, smallest):
        with pytest.raises(ValueError, match=f"^{name} .*{side}×{side}") as error:
            check_images(name, 10, (side, side, 3), 2)
        if name != "vit_b_16":  # which says that it needs a multiple of 16
            assert str(error.value).endswith(f"set data.image_size to {smallest} or more, or choose another model")


def test_images_that_are_flat():
    with pytest.raises(
        ValueError, match=r"resnet9 cannot take images of 4×64 pixels .* set data.image_size to 8 or more"
    ):
        check_images("resnet9", 10, (4, 64, 3), 2)


@pytest.mark.parametrize(("name", "side"), [("resnet18_cifar", 8), ("resnet50", 32)])
def test_a_batch_of_one_image(name, side):
    """Batch norm has no variance of a single value."""
    with pytest.raises(
        ValueError, match=rf"{name} cannot be trained on a batch of 1 of {side}×{side} .*at least 2 images"
    ):
        check_images(name, 10, (side, side, 3), 1)
    check_images("digits_cnn", 10, (8, 8, 1), 1)


def test_trying_a_model_draws_no_random_numbers():
    before = torch.get_rng_state()
    check_images("resnet18_cifar", 10, (8, 8, 3), 2)
    assert torch.equal(torch.get_rng_state(), before)
