"""The Hessian's largest eigenvalue and trace, where they are known."""

import numpy as np
import pytest
import torch

from hvdlocal.papers.sharpness import sharpness

pytest.importorskip("scipy")


def quadratic(eigenvalues, seed=0):
    """(w, A) with ½ wᵀAw of these eigenvalues, along random directions."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_(), matrix


@pytest.mark.parametrize("eigenvalues", [[3.0], [2.0, 5.0], [-7.0, 0.5, 4.0, 1.0], list(np.linspace(0, 10, 50))])
def test_a_quadratic(eigenvalues):
    """The largest, not the largest in magnitude; the trace within four standard errors, exactly for one dimension."""
    w, matrix = quadratic(eigenvalues)
    found = sharpness([w], lambda: [0.5 * w @ matrix @ w], probes=64)
    assert found.largest == pytest.approx(max(eigenvalues), rel=2e-3)
    assert abs(found.trace - sum(eigenvalues)) <= 4 * found.trace_error + 1e-9


def test_the_trace_of_a_diagonal_hessian_has_no_error():
    """Signs square to one."""
    scale = torch.arange(1.0, 6.0)
    w = torch.ones(5, requires_grad=True)
    found = sharpness([w], lambda: [(scale * w**4).sum() / 12])  # second derivatives: the scale
    assert found.trace == pytest.approx(15.0)
    assert found.trace_error == pytest.approx(0, abs=1e-5)
    assert found.largest == pytest.approx(5.0, rel=1e-3)


def test_batches_and_parameters_add_up():
    """Logistic regression: the Hessian is known, Σ p(1−p) x xᵀ."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 5, generator=generator)
    model = torch.nn.Linear(5, 1).requires_grad_()
    y = (torch.rand(40, generator=generator) < 0.5).float()

    def losses():
        for rows in torch.arange(40).split(16):
            logits = model(x[rows]).flatten()
            yield torch.nn.functional.binary_cross_entropy_with_logits(logits, y[rows], reduction="sum") / 40

    p = torch.sigmoid(model(x)).flatten().detach()
    inputs = torch.cat([x, torch.ones(40, 1)], dim=1)
    hessian = (inputs.T * (p * (1 - p))) @ inputs / 40
    found = sharpness(list(model.parameters()), losses, probes=400)
    assert found.largest == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-3)
    assert abs(found.trace - hessian.trace().item()) <= 4 * found.trace_error


def test_what_the_loss_does_not_depend_on_is_flat():
    w, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    assert sharpness([w, unused], lambda: [(w**2).sum()]).trace == pytest.approx(6.0)
    assert sharpness([unused], lambda: [(3 * unused).sum()]).trace == 0


def test_mistakes():
    with pytest.raises(ValueError, match="require a gradient"):
        sharpness([torch.ones(3)], lambda: [])
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="probes=1"):
        sharpness([w], lambda: [(w**2).sum()], probes=1)
