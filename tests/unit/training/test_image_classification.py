"""Models of other packages by import path."""

import types

from hvdlocal.training.config import ModelConfig
from hvdlocal.training.tasks import ImageClassification

IMAGES = types.SimpleNamespace(kind="images", shape=(32, 32, 3), classes=("a", "b", "c", "d", "e", "f", "g"), facts={})


def test_a_model_of_torchvision_gets_the_number_of_classes():
    model = ImageClassification().build_model(ModelConfig("torchvision.models:resnet18"), IMAGES)
    assert model.fc.weight.shape == (7, 512)
