"""Which gradients make an estimate of the statistics, and what it weighs."""

import pytest
import torch
from support.models import Slope, everywhere_equal, local, mean, sgd, slopes, step

import hvdlocal


def skip(optimizer):
    """What reaches the optimizer when a loop leaves out a bad batch but keeps the ranks in step."""
    optimizer.zero_grad()
    optimizer.step()


def grad_var(c, numel=10):
    return hvdlocal.gradient_statistics(numel * mean([x * x for x in c]), numel * mean(c) ** 2, len(c))[1]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stale", [True, False])
def test_a_rank_without_a_gradient_gives_no_estimate_on_any_rank(comm, stale, accumulate):
    c = slopes(comm)
    model = Slope()
    scaling = hvdlocal.LocalAdaScale(stale=stale, statistics="exact", smoothing=0.0)
    optimizer = local(model, 2, optimizer=sgd(model, lr=1e-3), scaling=scaling, accumulate=accumulate)
    for micro_batch in range(2 * accumulate):
        if micro_batch == accumulate - 1 and comm.rank == 0:
            skip(optimizer)
        else:
            step(optimizer, model, c[comm.rank])
    assert optimizer.round == 1
    assert (optimizer.grad_var, optimizer.gain) == (None, 1)
    for _ in range(2 * accumulate):
        step(optimizer, model, c[comm.rank])
    if comm.size > 1:
        assert optimizer.grad_var == pytest.approx(accumulate * grad_var(c), rel=1e-5), "the next round gives one"


@pytest.mark.parametrize("stale", [True, False])
def test_a_gradient_of_zero_is_a_gradient(comm, stale):
    c = [0.0, *slopes(comm)[1:]]
    model = Slope()
    optimizer = local(model, 1, scaling=hvdlocal.LocalAdaScale(stale=stale, statistics="exact", smoothing=0.0))
    step(optimizer, model, c[comm.rank])
    if comm.size > 1:
        assert optimizer.grad_var == pytest.approx(grad_var(c), rel=1e-5)


def test_a_parameter_without_a_gradient_among_others_counts_as_zero(comm):
    c = slopes(comm)
    a, b = Slope(), Slope()
    model = torch.nn.ModuleList([a, b])
    scaling = hvdlocal.LocalAdaScale(statistics="exact", smoothing=0.0)
    optimizer = local(model, 1, optimizer=sgd(model, lr=1e-3), scaling=scaling)
    (a(c[comm.rank]) + (b(3.0) if comm.rank == 0 else 0)).backward()
    optimizer.step()
    if comm.size > 1:
        expected = grad_var(c) + grad_var([3.0] + [0.0] * (comm.size - 1))
        assert optimizer.grad_var == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_micro_batch_without_a_gradient_gives_adascale_no_estimate(comm, accumulate):
    c = slopes(comm)
    model = Slope()
    scaling = hvdlocal.AdaScale(smoothing=0.0)
    optimizer = hvdlocal.SynchronousOptimizer(sgd(model, lr=1e-3), model, accumulate=accumulate, scaling=scaling)
    for micro_batch in range(accumulate):
        if micro_batch == 0 and comm.rank == 0:
            skip(optimizer)
        else:
            step(optimizer, model, c[comm.rank])
    assert optimizer.round == 1, "the step is taken: the missing gradient counts as zero in the mean"
    moved = 1e-3 * (mean(c) - c[0] / comm.size / accumulate)
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 5 - moved))
    assert (optimizer.grad_var, optimizer.gain) == (None, 1)
    for _ in range(accumulate):
        step(optimizer, model, c[comm.rank])
    if comm.size > 1:
        assert optimizer.grad_var == pytest.approx(grad_var(c * accumulate), rel=1e-5)


def test_an_accumulation_goes_on_without_the_gradient_that_was_missing(comm):
    """Its absence is part of the state."""
    model = Slope()
    optimizer = local(model, 1, scaling=hvdlocal.LocalAdaScale(stale=False), accumulate=2)
    skip(optimizer)
    other = Slope()
    resumed = local(other, 1, scaling=hvdlocal.LocalAdaScale(stale=False), accumulate=2)
    resumed.load_state_dict(optimizer.state_dict())
    step(resumed, other, slopes(comm)[comm.rank])
    assert (resumed.round, resumed.grad_var) == (1, None)


# FairScale's golden case of two steps on two workers: the gradient of an input x is x in both rows of the weight and 1 in both
# biases.
FAIRSCALE = [[[-0.2, 3.3], [5.2, 0.7]], [[1.0, 4.0], [3.1, 0.1]]]


class Sum(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x).sum()


def gains(make, inputs):
    """The gain after each step."""
    model = Sum()
    optimizer = make(sgd(model, lr=0.1), model)
    found = []
    for x in inputs:
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
        found.append(optimizer.gain)
    return found


def at_once(inner, model):
    scaling = hvdlocal.LocalAdaScale(stale=False, statistics="exact")
    return local(model, 1, optimizer=inner, scaling=scaling)


def test_fairscales_two_steps(comm):
    inputs = [torch.tensor(x[comm.rank % 2]) for x in FAIRSCALE]
    found = gains(at_once, inputs)
    if comm.size == 2:
        assert found[-1] == pytest.approx(1.67210, abs=5e-6)


def test_at_once_with_one_local_step_is_adascale(comm):
    """Many steps with changing statistics: the moving averages have the same weights."""
    generator = torch.Generator().manual_seed(comm.rank)
    inputs = [torch.randn(2, generator=generator) * (1 + i) for i in range(12)]

    def synchronous(inner, model):
        return hvdlocal.SynchronousOptimizer(inner, model, scaling=hvdlocal.AdaScale())

    assert gains(at_once, inputs) == pytest.approx(gains(synchronous, inputs), rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stale", [True, False])
def test_estimates_of_equal_rounds_weigh_alike(comm, stale, accumulate):
    """FairScale's moving average with M = K·H·a in all rounds: (θ x₁ + x₂) / (θ + 1)."""
    c = slopes(comm)
    model = Slope()
    scaling = hvdlocal.LocalAdaScale(stale=stale, statistics="exact")
    optimizer = local(model, 5, optimizer=sgd(model, lr=1e-6), scaling=scaling, accumulate=accumulate)
    for factor in (1.0, 3.0):
        for _ in range(5 * accumulate):
            step(optimizer, model, factor * c[comm.rank])
    if comm.size > 1:
        theta = 1 - comm.size * 5 * accumulate / 1000
        first = accumulate * grad_var(c)
        assert optimizer.grad_var == pytest.approx((theta * first + 9 * first) / (theta + 1), rel=1e-5)
    assert everywhere_equal(comm, torch.tensor([optimizer.progress], dtype=torch.float64))
