"""Which presets and settings of a method go together."""

import re
from typing import get_args

import pytest

from hvdlocal.training.config import MethodConfig, OuterConfig, PeriodConfig, Preset
from hvdlocal.training.method_checks import check_method

PRESETS = get_args(Preset)
DATA_PARALLEL = {"sync", "acc-lin", "acc-ada"}
RULES = {
    "constant": PeriodConfig(),
    "qsr": PeriodConfig("qsr", alpha=0.1, h_base=2),
    "power": PeriodConfig("power", alpha=0.1, h_base=2, exponent=1.0),
    "post-local": PeriodConfig("post-local", switch_epochs=1.0),
    "adacomm": PeriodConfig("adacomm"),
}
ALWAYS = {
    "plain": {},
    "no outer optimizer": {"outer": OuterConfig("none")},
    "nesterov": {"outer": OuterConfig("nesterov", normalize=True)},
    "slowmo": {"outer": OuterConfig("slowmo", momentum=0.5)},
    "overlap": {"overlap": 3},
    "mixing": {"overlap": 1, "mixing": 0.5},
    "moments": {"momentum": {"exp_avg": 3, "exp_avg_sq": 6}},
    "islands": {"island": 2},
    "islands that average parameters": {"island": 2, "island_period": 3},
    "all of it": {"outer": OuterConfig("nesterov"), "overlap": 2, "momentum": {"exp_avg": 3}, "island": "node"},
}


def reason(method):
    """Why a method is refused; None if it is not."""
    try:
        check_method(method)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("what", ALWAYS)
@pytest.mark.parametrize("preset", PRESETS)
def test_what_makes_sense_is_allowed_and_nothing_else(preset, what):
    settings = ALWAYS[what]
    allowed = True
    if preset in DATA_PARALLEL:  # moments have no effect there, as with the policy "average"
        allowed = what in ("plain", "no outer optimizer", "moments")
    if preset == "local-ada-nostale":
        allowed &= "overlap" not in settings
    if "ada" in preset:
        allowed &= "island_period" not in settings
    if preset in ("diloco", "slowmo") and "outer" in settings:
        allowed &= settings["outer"].name == {"diloco": "nesterov", "slowmo": "slowmo"}[preset]
    for rule, period in RULES.items():
        found = reason(MethodConfig(preset, period=period, **settings))
        assert (found is None) is allowed, (rule, found)
        assert found is None or f"method.preset={preset}" in found


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_local_or_data_parallel(preset):
    method = MethodConfig(preset)
    assert method.is_local is (preset not in DATA_PARALLEL)
    assert method.outer_optimizer == {"diloco": "nesterov", "slowmo": "slowmo"}.get(preset, "none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixing": 0.5}, "method.mixing=0.5 without overlap"),
        ({"momentum": {}}, "method.momentum={}: name at least one moment"),
        (
            {"momentum": {"exp_avg": 0}},
            "method.momentum={'exp_avg': 0}: the period of exp_avg must be a whole number of at least 1",
        ),
        ({"momentum": {1: 2}}, "1 is no name of a moment"),
        (
            {"momentum": {"exp_avg": 4, "exp_avg_sq": 6}},
            "the period of exp_avg_sq, 6, must be a multiple of 4, that of exp_avg, so that both travel in one message",
        ),
        ({"momentum": {"a": 2, "b": 12, "c": 4, "d": 6}}, "the period of d, 6, must be a multiple of 4, that of c"),
        ({"buffers": {"norm": "mean"}}, "method.buffers={'norm': 'mean'}: choose one of average, local, reestimate"),
    ],
)
def test_the_reason(settings, message):
    assert re.search(re.escape(message), reason(MethodConfig("local", **settings)))


def test_moments_whose_periods_divide_one_another():
    assert reason(MethodConfig("local", momentum={"a": 6, "b": 1, "c": 12, "d": 6})) is None
