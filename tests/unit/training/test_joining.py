"""The configuration's islands and the environment's."""

import pytest

from hvdlocal.training.config import DataConfig, MethodConfig, ModelConfig, TrainConfig
from hvdlocal.training.joining import join


def configured(island):
    return TrainConfig(
        DataConfig("data"), ModelConfig("digits_cnn"), "out", method=MethodConfig("local", island=island)
    )


@pytest.mark.parametrize(("island", "variable"), [(1, "2"), (4, "2"), ("node", "4"), (2, "node")])
def test_an_environment_that_asks_for_other_islands_is_refused(monkeypatch, island, variable):
    monkeypatch.setenv("HVDLOCAL_ISLAND", variable)
    told = rf"HVDLOCAL_ISLAND={variable}, but method\.island={island}: the configuration decides"
    with pytest.raises(ValueError, match=told):
        join(configured(island))


@pytest.mark.parametrize(("island", "variable"), [(1, "1"), (2, "2"), ("node", "node"), (2, "")])
def test_one_that_asks_for_the_same_is_not(monkeypatch, island, variable):
    monkeypatch.setenv("HVDLOCAL_ISLAND", variable)
    monkeypatch.setattr("hvdlocal.training.joining.init", lambda island, survive: ("joined", island))
    assert join(configured(island)) == ("joined", island)
