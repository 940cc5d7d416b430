"""Every number of a configuration has a range, which is checked whether or not the chosen method uses the number."""

import math
from dataclasses import fields, is_dataclass, replace
from typing import get_args, get_type_hints

import pytest
from support.configs import digits_config

from hvdlocal.training.config import SETTINGS, MethodConfig, TrainConfig, flatten
from hvdlocal.training.config_checks import check_ranges

CONFIG = digits_config(method=MethodConfig(overlap=1))  # without which mixing is refused, whatever its value


def numbers(kind, prefix=""):
    """The numeric settings of a dataclass of dataclasses, and whether they are whole numbers."""
    hints, found = get_type_hints(kind), {}
    for field in fields(kind):
        hint, key = hints[field.name], prefix + field.name
        if is_dataclass(hint):
            found |= numbers(hint, f"{key}.")
        elif kinds := {int, float} & {hint, *get_args(hint)}:
            found[key] = kinds == {int}
    return found


NUMBERS = numbers(TrainConfig)


def changed(tree, key, value):
    name, _, rest = key.partition(".")
    return replace(tree, **{name: changed(getattr(tree, name), rest, value) if rest else value})


def given(key, value):
    pair = isinstance(flatten(CONFIG)[key], tuple)
    return changed(CONFIG, key, (0.5, value) if pair else value)


def test_every_number_has_one():
    assert {name for name, setting in SETTINGS.items() if setting.range} == set(NUMBERS)


@pytest.mark.parametrize("key", NUMBERS)
def test_what_is_outside(key):
    check_ranges(CONFIG)
    limits = SETTINGS[key].range
    outside = [-1, limits.high * 2, -(10**400), 10**400, math.nan, math.inf, -math.inf]
    outside += [limits.low] if limits.above else [limits.low - 1]
    outside += [limits.high] if limits.below else []
    for number in outside:
        with pytest.raises(ValueError, match=rf"^{key}=.*: must be ") as error:
            check_ranges(given(key, number))
        assert len(str(error.value)) < 120 + 401
    inside = (limits.low + limits.high) / 2 if limits.below else limits.high
    check_ranges(given(key, inside if limits.above else limits.low))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schedule.step_factor", 1e30, "schedule.step_factor=1e+30: must be positive, and at most 1"),
        ("data.min_area", 0.0, "data.min_area=0.0: must be positive, and at most 1"),
        ("method.smoothing", 1.0, "method.smoothing=1.0: must be at least 0, and below 1"),
        ("method.sketch_size", 15, "method.sketch_size=15: must be from 16 to 2,147,483,647"),
        ("epochs", math.nan, "epochs=nan: must be positive, and at most 1e30"),
        ("data.mixup", -1.0, "data.mixup=-1.0: must be from 0 to 1,000"),
        ("optimizer.betas", math.nan, "optimizer.betas=(0.5, nan): must be at least 0, and below 1"),
    ],
)
def test_what_is_said(key, value, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the next line is the match)
        check_ranges(given(key, value))
    assert str(error.value) == message


@pytest.mark.parametrize("key", ["output", "data.path"])
@pytest.mark.parametrize("path", ["", "a\0b"])
def test_paths(key, path):
    with pytest.raises(ValueError, match=f"^{key}="):
        check_ranges(changed(CONFIG, key, path))
