"""Every setting reaches the object that it is meant for."""

import pytest
import torch
from support.configs import digits_config

from hvdlocal import AdaComm, AdaScale, ConstantPeriod, LinearScaling, LocalAdaScale, NoScaling, PostLocal, PowerRule
from hvdlocal.communicator import SingleProcess
from hvdlocal.training.config import MethodConfig, OptimizerConfig, PeriodConfig
from hvdlocal.training.config_checks import check_ranges, unused_settings
from hvdlocal.training.optimizers import build_inner, build_optimizer
from hvdlocal.training.rules import build_period, build_scaling, micro_batches_per_step
from hvdlocal.training.run_length import RunLength


@pytest.mark.parametrize(
    ("method", "scaling"),
    [
        (MethodConfig("sync"), NoScaling()),
        (MethodConfig("local"), NoScaling()),
        (MethodConfig("diloco"), NoScaling()),
        (MethodConfig("slowmo"), NoScaling()),
        (MethodConfig("acc-lin", linear_warmup=0.1), LinearScaling(0.1)),
        (MethodConfig("local-lin", linear_warmup=0.2), LinearScaling(0.2)),
        (MethodConfig("acc-ada", smoothing=0.5), AdaScale(0.5)),
        (
            MethodConfig("local-ada", c=0.6, statistics="exact", smoothing=0.9),
            LocalAdaScale(c=0.6, statistics="exact", smoothing=0.9),
        ),
        (MethodConfig("local-ada-nostale", sketch_size=512), LocalAdaScale(stale=False, sketch_size=512)),
    ],
)
def test_scaling(method, scaling):
    assert build_scaling(method) == scaling


def test_micro_batches_per_step():
    assert micro_batches_per_step(MethodConfig("acc-ada", PeriodConfig(period=6))) == 6
    assert micro_batches_per_step(MethodConfig("local-ada", PeriodConfig(period=6), accumulate=3)) == 3


@pytest.mark.parametrize(
    ("period", "rule"),
    [
        (PeriodConfig(period=5, max_period=3), ConstantPeriod(5, max_period=3)),
        (PeriodConfig("adacomm", period=5), AdaComm(5)),
        (PeriodConfig("post-local", period=5, switch_epochs=3), PostLocal(switch=30, period=5)),
        (PeriodConfig("qsr", alpha=0.2, h_base=4), PowerRule(0.2, 4, 2.0, warmup=20, warmup_lr=0.4)),
        (PeriodConfig("power", alpha=0.2, h_base=4, exponent=1.0), PowerRule(0.2, 4, 1.0, warmup=20, warmup_lr=0.4)),
    ],
)
def test_period(period, rule):
    assert build_period(period, peak_lr=0.4, warmup=20, epoch=10) == rule


def test_no_warmup_of_the_rule_without_one_of_the_schedule():
    assert build_period(PeriodConfig("qsr", alpha=0.2, h_base=4), 0.4, 0, 10) == PowerRule(0.2, 4, 2.0)


def test_inner_optimizers():
    model = torch.nn.Linear(1, 1)
    sgd = build_inner(OptimizerConfig("sgd", 0.3, momentum=0.8, nesterov=True, weight_decay=0.01), model)
    assert isinstance(sgd, torch.optim.SGD)
    assert {"lr": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}.items() <= sgd.defaults.items()
    adamw = build_inner(OptimizerConfig("adamw", 0.3, betas=(0.5, 0.6), weight_decay=0.01), model)
    assert isinstance(adamw, torch.optim.AdamW)
    assert {"lr": 0.3, "betas": (0.5, 0.6), "weight_decay": 0.01}.items() <= adamw.defaults.items()


def test_optimizer_gets_the_method():
    length = RunLength(epoch=10, budget=70, schedule=lambda progress: 0.1, reference_batches=1)
    method = MethodConfig("local-ada", PeriodConfig("qsr", alpha=0.2, h_base=4, rate="base"), 3, "average", "local")
    optimizer = build_optimizer(
        digits_config(method=method, optimizer=OptimizerConfig(max_norm=2.0)),
        torch.nn.Linear(1, 1),
        length,
        SingleProcess(),
    )
    assert (optimizer.accumulate, optimizer.budget, optimizer._max_norm) == (3, 70, 2.0)
    assert (optimizer._memory.periods, optimizer._buffers, optimizer._planner.rate) == (
        {"momentum_buffer": 1},
        "local",
        "base",
    )
    acc = MethodConfig("acc-lin", PeriodConfig(period=5), buffers="local")
    optimizer = build_optimizer(
        digits_config(method=acc, optimizer=OptimizerConfig(max_norm=2.0)),
        torch.nn.Linear(1, 1),
        length,
        SingleProcess(),
    )
    assert (optimizer.accumulate, optimizer.budget, optimizer._max_norm, optimizer._buffers) == (
        5,
        70,
        2.0,
        "local",
    )


@pytest.mark.parametrize(
    ("settings", "unused"),
    [
        ({}, []),
        (
            {"method": MethodConfig("sync", PeriodConfig(period=4), momentum="reset", c=0.5)},
            ["momentum", "period.period", "c"],
        ),
        ({"method": MethodConfig("local-ada", statistics="exact", sketch_size=99)}, ["sketch_size"]),
        ({"method": MethodConfig("local-lin", linear_warmup=0.1)}, []),
        ({"method": MethodConfig("acc-ada", linear_warmup=0.1, smoothing=0.1)}, ["linear_warmup"]),
        ({"optimizer": OptimizerConfig("adamw", nesterov=True)}, ["nesterov"]),
    ],
)
def test_settings_without_effect_are_named(settings, unused):
    names = [
        name.split("=")[0].removeprefix("method.").removeprefix("optimizer.")
        for name in unused_settings(digits_config(**settings))
    ]
    assert sorted(names) == sorted(unused)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0},
        {"evaluate_every_epochs": -1},
        {"evaluation_batch_size": 0},
        {"label_smoothing": 1.5},
        {"threads": 0},
        {"optimizer": OptimizerConfig(lr=0)},
        {"method": MethodConfig(reestimate_batches=0)},
    ],
)
def test_ranges(settings):
    check_ranges(digits_config())
    with pytest.raises(ValueError, match=next(iter(settings))):
        check_ranges(digits_config(**settings))
