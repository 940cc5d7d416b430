"""Fig. 7: the full gradient and its variation."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

import hvdlocal
from hvdlocal.cli import main
from hvdlocal.papers.gradient_norms import coefficient_of_variation, full_gradient_norm, moments


def test_the_coefficient_of_variation():
    assert coefficient_of_variation([3.0, 3.0, 3.0]) == 0
    assert coefficient_of_variation([1.0, 3.0]) == pytest.approx(2**0.5 / 2)


def test_windows_do_not_overlap():
    assert moments(64) == [0, 32]
    assert moments(190) == [0, 47, 95, 142]
    assert moments(7500) == [0, 75, 375, 750, 1875, 3750, 5625, 7125]
    for budget in range(64, 2000, 7):
        starts = moments(budget)
        assert len(starts) >= 2
        assert all(b - a >= 32 for a, b in pairwise(starts))
        assert starts[-1] + 32 <= budget
    with pytest.raises(ValueError, match="63 steps: at least 64"):
        moments(63)


def test_the_norm_of_a_gradient_that_is_known():
    """A linear layer at zero: all classes have probability ½, so ∇W = mean of (p − y) xᵀ, over batches of any size."""
    model = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(model.weight)
    x = torch.tensor([[3.0, 0.0], [0.0, 4.0], [3.0, 0.0], [0.0, 4.0]])
    y = torch.tensor([0, 1, 0, 1])
    # Rows of ∇W: ¼ Σ (½ − [y = c]) x = (−¾, 1) and (¾, −1).
    for batches in ([(x, y)], [(x[:1], y[:1]), (x[1:], y[1:])]):
        assert full_gradient_norm(model, batches) == pytest.approx(1.25 * 2**0.5)


def test_the_model_stays_as_it_is():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    full_gradient_norm(model, [(torch.randn(8, 3), torch.zeros(8, dtype=torch.long))])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def test_the_command(tmp_path, capsys):
    random = np.random.default_rng(0)
    for split, number in (("train", 600), ("test", 20)):
        labels = np.arange(number) % 10
        images = (
            random.integers(0, 30, (number, 8, 8, 3), dtype=np.uint8)
            + (labels * 20).astype(np.uint8)[:, None, None, None]
        )
        hvdlocal.ShardWriter(tmp_path / "data", split, classes=list("abcdefghij")).write(images, labels)
    arguments = ["reproduce", "fig7", "--data", str(tmp_path / "data"), "--output", str(tmp_path)]
    assert main([*arguments, "--epochs", "3"]) == 2
    assert "the run has 56 steps: at least 64 are needed" in capsys.readouterr().err
    assert main([*arguments, "--epochs", "5"]) == 0
    assert "epoch   0.00" in capsys.readouterr().out
    windows = json.loads((tmp_path / "fig7.json").read_text())["windows"]
    assert [round(window["epoch"] * 18.75) for window in windows] == [0, 47]
    assert all(len(window["norms"]) == 32 for window in windows)
    assert len((tmp_path / "fig7.md").read_text().splitlines()) == 12
    assert main([*arguments, "--epochs", "5", "--optimizer.lr", "1e9"]) == 2
    assert "the gradient is nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig7", "--data", "/nowhere"], "no data in /nowhere/train: python -m data_prep cifar10"),
        (["fig7", "--precision=bfloat16"], "fig7 is plain SGD on one worker, to which precision means nothing"),
        (["fig7", "--method.preset", "local"], "to which method.preset means nothing"),
        (["fig7", "--optimizer.max_norm=1"], "to which optimizer.max_norm means nothing"),
        (["bounds", "--scale", "paper"], "bounds has no option --scale"),
        (["--seed", "1", "bounds"], "the experiment's name comes first"),
    ],
)
def test_mistakes(arguments, message, tmp_path, capsys):
    assert main(["reproduce", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
