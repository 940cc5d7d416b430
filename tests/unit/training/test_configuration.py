"""Configurations from Python: files and mappings mean the same, and mistakes are one sentence."""

import dataclasses
from pathlib import Path

import pytest
import yaml

import hvdlocal
from hvdlocal.cli.configuration import parse

RUN = {
    "data": {"path": "data", "batch_size": 8},
    "model": {"name": "digits_cnn"},
    "output": "out",
    "optimizer": {"lr": 1e-5, "betas": (0.9, 0.95)},
    "method": {"buffers": {"norm.*": "local"}},
    "task_arguments": {"weights": [1, {"a": None}], "name": "1"},
    "epochs": 3,
}


def test_a_mapping_means_what_a_file_means(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, "optimizer": {"lr": 1e-5, "betas": [0.9, 0.95]}}))
    expected = parse([str(file)])
    assert hvdlocal.load_config(RUN) == hvdlocal.load_config(file) == hvdlocal.load_config(str(file)) == expected
    assert expected.optimizer.betas == (0.9, 0.95)
    assert expected.task_arguments == RUN["task_arguments"]


def test_later_settings_replace_earlier_ones():
    config = hvdlocal.load_config(RUN, {"optimizer": {"lr": 0.5}, "method.period.period": 4, "output": Path("a") / "b"})
    assert (config.optimizer.lr, config.method.period.period, config.output) == (0.5, 4, "a/b")
    assert config.optimizer.betas == (0.9, 0.95)
    changed = dataclasses.replace(hvdlocal.load_config(RUN), epochs=7.0)
    assert changed == hvdlocal.load_config(RUN, {"epochs": 7})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({**RUN, "optimizr": {"lr": 1}}, "there is no key 'optimizr'"),
        ({**RUN, "optimizer": 3}, "'optimizer' is a section: write its keys below it"),
        ({**RUN, "epochs": "x"}, "epochs: Expected a number. Got value: x"),
        ({**RUN, "epochs": None}, "'epochs' has no value"),
        ({**RUN, "seed": {1, 2}.__iter__}, "builtin_function_or_method|method-wrapper"),
        ({"output": "x"}, r"required: data\.path, model\.name"),
        (3, "the configuration is a int: give the path of a YAML file, or a dict"),
        ("nowhere.yaml", r"there is no file nowhere\.yaml"),
    ],
)
def test_mistakes(source, message):
    with pytest.raises(ValueError, match=message) as error:
        hvdlocal.load_config(source)
    assert "\n" not in str(error.value)
