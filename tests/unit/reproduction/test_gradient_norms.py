"""Fig. 7: the full gradient and its variation."""

import numpy as np
import pytest
import torch

import hvdlocal
from hvdlocal.cli import main
from hvdlocal.reproduction.gradient_norms import coefficient_of_variation, full_gradient_norm


def test_the_coefficient_of_variation():
    assert coefficient_of_variation([3.0, 3.0, 3.0]) == 0
    assert coefficient_of_variation([1.0, 3.0]) == pytest.approx(0.5)


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
    assert main([*arguments, "--epochs", "1"]) == 2
    assert "are 19 steps: more than 32 are needed" in capsys.readouterr().err
    assert main([*arguments, "--epochs", "5"]) == 0
    report = (tmp_path / "fig7.md").read_text()
    assert "| epoch | ‖∇f‖ | H = 2 | H = 8 | H = 32 |" in report
    assert "epoch   0.00" in capsys.readouterr().out
