"""A new setting is one entry in `config`: its text, range and other facts stand beside it, and nothing else lists it."""

from __future__ import annotations

from typing import Literal, get_args, get_origin

import pytest

from hvdlocal.averaging import buffers
from hvdlocal.models import MODELS
from hvdlocal.training.config import SETTINGS, flatten
from hvdlocal.training.config_checks import NAMES
from hvdlocal.training.configuration import _parser
from hvdlocal.training.method_checks import BUFFER_POLICIES
from hvdlocal.training.rules import RULE_SETTINGS
from hvdlocal.training.tasks import TASKS

FREE = {
    "data.path",
    "data.train_split",
    "data.test_split",
    "data.inputs",
    "data.targets",
    "data.test_path",
    "data.transform",
    "task",
    "model.name",
    "method.buffers",
    "output",
}
"""Settings that are any text, which other places check."""

HELP = {action.dest: action.help for action in _parser()._actions}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_text_and_limits(name):
    setting, text = SETTINGS[name], HELP[name]
    assert text.partition(" Must be ")[0] not in ("", "None")
    assert "Annotated" not in text
    kinds = {setting.type, *get_args(setting.type)}
    if kinds & {int, float}:
        assert f"Must be {setting.range}." in text
    elif setting.type is dict:
        assert name.endswith("arguments")
    elif str in kinds:
        assert name in FREE or name in NAMES
    elif setting.type is list:
        assert name == "callbacks"
    else:
        assert bool in kinds or any(get_origin(kind) is Literal for kind in kinds)


def test_the_help_has_every_setting_and_its_plain_type():
    shown = _parser().format_help()
    assert all(f"--{name} " in shown for name in SETTINGS)
    assert "Annotated" not in shown
    assert "--tensorboard {true,false}" in shown


def test_settings_that_only_some_rules_take():
    assert RULE_SETTINGS == {
        "alpha": ("qsr", "power"),
        "h_base": ("qsr", "power"),
        "exponent": ("power",),
        "switch_epochs": ("post-local",),
    }


def test_what_may_change_in_a_continued_run():
    fixed = {name for name, setting in SETTINGS.items() if not setting.resumable}
    assert {"seed", "epochs", "data.batch_size", "model.name", "optimizer.lr", "method.preset"} <= fixed
    assert not fixed & {"output", "data.path", "data.threads", "device", "checkpoint.every_steps", "overwrite"}
    uncompared = {name for name, setting in SETTINGS.items() if not setting.compared}
    assert {name.partition(".")[0] for name in uncompared} == {
        "output", "overwrite", "callbacks", "tensorboard", "log_every_seconds", "checkpoint", "time_limit_minutes"
    }  # fmt: skip
    assert not uncompared & fixed


def test_what_other_modules_list_too():
    assert buffers.BUFFER_POLICIES == BUFFER_POLICIES
    models, tasks = (" ".join(HELP[name].split()) for name in ("model.name", "task"))
    assert models.startswith(f"One of {', '.join(MODELS)}; for the task language-model, gpt; or the import path of")
    *others, last = sorted(TASKS)
    assert tasks.startswith(f"What is learned: {', '.join(others)} or {last}, or your own")


def test_flatten_reads_what_a_run_wrote():
    written = {"data": {"path": "x"}, "method": {"buffers": {"norm.*": "local"}, "later": {"new": 1}}}
    assert flatten(written) == {"data.path": "x", "method.buffers": {"norm.*": "local"}, "method.later.new": 1}
    with pytest.raises(ValueError, match="not a configuration"):
        flatten([])
