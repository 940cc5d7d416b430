"""The projection keeps norms: exactly when nothing is compressed, without bias and within its error otherwise."""

import math

import pytest
import torch

from hvdlocal.averaging.flat_buffer import CoordinateSample
from hvdlocal.averaging.sketch import GradientSketch

CPU = torch.device("cpu")


def project(sketch, tensors):
    out = torch.empty(sketch.size)
    sketch.project(tensors, out)
    return out


def test_short_vectors_are_only_signed():
    torch.manual_seed(0)
    tensors = [torch.randn(n) for n in (30, 7, 64)]
    sketch = GradientSketch([30, 7, 64], 4096, CPU)
    assert sketch.size == 101
    out = project(sketch, tensors)
    assert torch.equal(out.abs().sort().values, torch.cat(tensors).abs().sort().values)


def test_it_is_linear():
    torch.manual_seed(0)
    numels = [5000, 33, 1024, 640]
    sketch = GradientSketch(numels, 64, CPU)
    a, b = ([torch.randn(n) for n in numels] for _ in range(2))
    both = project(sketch, [(x + y) / 2 for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(both, (project(sketch, a) + project(sketch, b)) / 2, rtol=1e-4, atol=1e-4)


def test_every_coordinate_counts_once():
    """A unit vector along any coordinate has norm 1 in the sketch: it meets one bucket, with a sign."""
    numels = [70, 3, 129]
    sketch = GradientSketch(numels, 32, CPU)
    for tensor, numel in enumerate(numels):
        for i in range(numel):
            tensors = [torch.zeros(n) for n in numels]
            tensors[tensor][i] = 1
            out = project(sketch, tensors)
            assert out.abs().sum() == 1


@pytest.mark.parametrize("size", [256, 1024])
def test_squared_norm_is_unbiased_and_within_its_error(size):
    """Over 300 random vectors the mean error is 0 within 4 standard errors, and the spread is sqrt(2/size)."""
    torch.manual_seed(0)
    numels = [40_000, 10_000, 500]
    sketch = GradientSketch(numels, size, CPU)
    errors = []
    for _ in range(300):
        tensors = [torch.randn(n) * scale for n, scale in zip(numels, (1.0, 3.0, 0.1), strict=True)]
        exact = sum(float(t.double().square().sum()) for t in tensors)
        errors.append(float(project(sketch, tensors).double().square().sum()) / exact - 1)
    spread = math.sqrt(2 / size)
    errors = torch.tensor(errors)
    assert abs(errors.mean()) < 4 * spread / math.sqrt(300)
    assert errors.std() == pytest.approx(spread, rel=0.3)


@pytest.mark.parametrize("size", [256, 1024])
def test_correlated_rows_do_not_spoil_the_error(size):
    """The gradient of a layer is close to low rank: here all rows are multiples of one vector, the worst case of all."""
    torch.manual_seed(0)
    row = torch.randn(size)
    matrix = torch.outer(torch.randn(200).abs() + 0.5, row).flatten()
    exact = float(matrix.double().square().sum())
    errors = []
    for seed in range(60):
        out = torch.empty(size)
        GradientSketch([matrix.numel()], size, CPU, seed).project([matrix], out)
        errors.append(float(out.double().square().sum()) / exact - 1)
    # eight of 200 rows share their column signs: sqrt(2 · 7/200) on top of sqrt(2/size)
    assert float(torch.tensor(errors).square().mean().sqrt()) < 1.3 * math.sqrt(2 / size + 2 * 7 / 200)


def test_all_ranks_draw_the_same_signs():
    torch.manual_seed(1)
    first = GradientSketch([1000, 10], 64, CPU)
    torch.manual_seed(2)
    second = GradientSketch([1000, 10], 64, CPU)
    tensors = [torch.ones(1000), torch.ones(10)]
    assert torch.equal(project(first, tensors), project(second, tensors))


def test_sampled_distance_is_exact_when_all_is_sampled_and_close_when_not():
    torch.manual_seed(0)
    small = torch.zeros(1000)
    sample = CoordinateSample(small)
    small += 0.5
    assert float(sample.distance()) == pytest.approx(250.0)
    sample.move_origin()
    assert float(sample.distance()) == 0

    large = torch.zeros(1_000_000)
    sample = CoordinateSample(large)
    large += torch.randn(1_000_000)
    assert float(sample.distance()) == pytest.approx(1_000_000, rel=4 * math.sqrt(2 / CoordinateSample.SIZE))
