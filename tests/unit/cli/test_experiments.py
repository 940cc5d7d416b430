"""Every file in experiments/ is a configuration that `hvdlocal train` takes."""

from pathlib import Path

import pytest

from hvdlocal.cli.configuration import parse
from hvdlocal.models import MODELS
from hvdlocal.training.config_checks import check_ranges, unused_settings
from hvdlocal.training.rules import build_period, build_scaling, micro_batches_per_step
from hvdlocal.training.schedules import build_schedule

FILES = sorted((Path(__file__).parents[3] / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_it_can_be_trained(path):
    config = parse([str(path)])
    check_ranges(config)
    assert config.model.name in (MODELS if config.task == "image-classification" else {"gpt"})
    assert unused_settings(config) == []
    assert config.output == f"runs/{path.stem}"
    build_scaling(config.method)
    assert micro_batches_per_step(config.method) == 1
    build_period(config.method.period, config.optimizer.lr, 0.0, 100.0)
    build_schedule(config.schedule, config.optimizer.lr, 100 * config.epochs, 100.0)


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_it_says_what_it_is_and_how_to_start_it(path):
    comment = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    assert any(path.name in line or "hvdlocal reproduce" in line for line in comment[1:])


@pytest.mark.parametrize(
    ("name", "lr", "epochs", "schedule"),
    [
        ("cifar10_resnet18", 0.1, 200, "cosine"),
        ("imagenet32_wrn_28_2", 0.01, 40, "step 10 0.5"),
        ("imagenet_resnet50", 0.1, 90, "step 30 0.1"),
    ],
)
def test_hyperparameters_of_balles_et_al(name, lr, epochs, schedule):
    """App. H.1."""
    config = parse([str(FILES[0].with_name(f"{name}.yaml"))])
    optimizer, found = config.optimizer, config.schedule
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay, config.epochs) == (lr, 0.9, 5e-4, epochs)
    shape = [found.name] if found.step_epochs is None else ["step", f"{found.step_epochs:g}", f"{found.step_factor:g}"]
    assert " ".join(shape) == schedule
