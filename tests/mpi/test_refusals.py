"""Mistakes: one clear sentence on every rank, before anything is lost or waits."""

import copy
import math

import pytest
import torch
from support.models import Slope, local, mean, sgd, slopes, step
from torch.nn.utils import prune

import hvdlocal


def wrap(model, **settings):
    return local(model, **settings)


def half_model():
    return Slope().bfloat16()


def stranger(model):
    return {"optimizer": sgd(Slope())}


REFUSED = [
    (lambda m: local(m, optimizer="sgd"), "torch.optim.Optimizer"),
    (lambda m: local(m, optimizer=local(m)), "torch.optim.Optimizer"),
    (lambda m: local(m, optimizer=sgd(Slope())), "1 of the optimizer's 1 parameters are not the model's"),
    (lambda m: local(m, optimizer=torch.optim.LBFGS(m.parameters())), "several times per step"),
    (lambda m: hvdlocal.LocalOptimizer(sgd(m), m, period=8), "ConstantPeriod"),
    (lambda m: local(m, momentum="avg"), "choose one of local, average, reset"),
    (lambda m: local(m, buffers="mean"), "choose one of average, local, reestimate"),
    (lambda m: local(m, accumulate=0), "accumulate=0"),
    (lambda m: local(m, accumulate=1.5), "accumulate=1.5: must be a whole number"),
    (lambda m: local(m, accumulate="2"), "accumulate='2': must be a whole number"),
    (lambda m: local(m, budget=0), "budget=0"),
    (lambda m: local(m, budget="9"), "budget='9': a positive number"),
    (lambda m: local(m, max_norm=0), "max_norm=0"),
    (lambda m: local(m, max_norm="1"), "max_norm='1': must be a positive number"),
    (lambda m: local(m, scaling=hvdlocal.LocalAdaScale(sketch_size=100.5)), r"sketch_size=100.5\): must be a whole"),
    (lambda m: local(m, scaling=hvdlocal.LocalAdaScale(c=math.nan)), r"c=nan\): c must be"),
    (lambda m: local(m, rate_for_period="γ"), "rate_for_period"),
    (lambda m: local(m, scaling="ada"), "LocalAdaScale"),
    (lambda m: local(m, scaling=hvdlocal.AdaScale()), r"LocalAdaScale\(c=0\)"),
    (lambda m: local(m, scaling=hvdlocal.LinearScaling()), "budget"),
    (lambda m: hvdlocal.SynchronousOptimizer(sgd(m), m, scaling=hvdlocal.LocalAdaScale()), r"AdaScale\(\)"),
    (lambda m: hvdlocal.SynchronousOptimizer(sgd(m), m, scaling=hvdlocal.LinearScaling()), "budget"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_wrong_arguments(comm, make, message):
    with pytest.raises(ValueError, match=message):
        make(Slope())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_refused(comm, dtype):
    with pytest.raises(ValueError, match=rf"parameter 'w' is {dtype}.*autocast"):
        local(Slope().to(dtype))


def test_models_that_cannot_be_averaged_are_refused(comm):
    frozen = Slope().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        local(frozen)
    lazy = torch.nn.LazyLinear(3)
    with pytest.raises(ValueError, match="no shape yet"):
        local(lazy)
    model = torch.nn.BatchNorm1d(3)
    model.running_mean = model.running_mean.double()
    with pytest.raises(ValueError, match=r"buffer 'running_mean' is torch.float64.*buffers={'running_mean': 'local'}"):
        local(model)
    local(model, buffers="local")


def test_a_setting_that_differs_is_named_on_every_rank(comm):
    model = Slope()
    last = comm.size - 1
    period = 8 if comm.rank == last and last else 4
    if comm.size == 1:
        local(model, period)
        return
    with pytest.raises(hvdlocal.DisagreementError, match=rf"period: rank {last} has '.*8.*rank 0 has '.*4"):
        local(model, period)


def test_another_model_on_one_rank_is_found(comm):
    model = Slope(numel=10 + comm.rank)
    if comm.size == 1:
        return
    with pytest.raises(hvdlocal.DisagreementError, match=r"model \(names, shapes"):
        local(model)


def test_a_model_moved_after_wrapping_is_noticed(comm):
    model = Slope()
    optimizer = local(model)
    model.w.data = model.w.data.clone()
    with pytest.raises(RuntimeError, match=r"'w' of a Slope no longer lies.*Build the LocalOptimizer last"):
        step(optimizer, model, 1.0)


def test_assigned_weights_and_rebound_buffers_are_noticed(comm):
    model = Slope()
    optimizer = local(model)
    model.load_state_dict({"w": torch.zeros(10)}, assign=True)
    model(1.0).backward()
    with pytest.raises(RuntimeError, match="assign=True"):
        optimizer.step()

    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
    optimizer = local(model)
    model(torch.ones(3, 2)).sum().backward()
    model[0].running_mean = 0.9 * model[0].running_mean
    with pytest.raises(RuntimeError, match="change buffers in place"):
        optimizer.step()


def test_assigned_weights_are_noticed_when_synchronous(comm):
    """They would have no gradient in the optimizer's eyes, and never move."""
    model = Slope()
    optimizer = hvdlocal.SynchronousOptimizer(sgd(model), model)
    model.load_state_dict({"w": torch.zeros(10)}, assign=True)
    with pytest.raises(RuntimeError, match=r"'w' of a Slope was replaced.*assign=True"):
        step(optimizer, model, 1.0)


@pytest.mark.parametrize("wrap", [local, lambda model: hvdlocal.SynchronousOptimizer(sgd(model), model)])
def test_pruning_while_training(comm, wrap):
    """The parameter has another name from then on, and its old one is that of a tensor that is computed."""
    model = Slope()
    optimizer = wrap(model)
    mask = torch.tensor([0.0] * 4 + [1.0] * 6)
    prune.custom_from_mask(model, "w", mask)
    step(optimizer, model, 1.0)
    model(1.0)
    torch.testing.assert_close(model.w.detach(), 4 * mask)


def test_parameters_unfrozen_later_are_noticed_when_synchronous(comm):
    a, b = Slope(), Slope().requires_grad_(False)
    model = torch.nn.ModuleList([a, b])
    optimizer = hvdlocal.SynchronousOptimizer(sgd(model), model)
    b.requires_grad_(True)
    (a(1.0) + b(1.0)).backward()
    with pytest.raises(RuntimeError, match="after unfreezing"):
        optimizer.step()


def test_uneven_numbers_of_steps_are_noticed(comm):
    """The commonest mistake of a hand-made loader: one rank has a batch less."""
    model = Slope()
    optimizer = local(model, 8)
    last = comm.size > 1 and comm.rank == comm.size - 1
    for _ in range(3 if last else 4):
        step(optimizer, model, 0.0)
    if comm.size == 1:
        optimizer.synchronize()
        return
    with pytest.raises(RuntimeError, match="call step equally often"):
        optimizer.synchronize()


def test_copies_are_refused(comm):
    optimizer = local(Slope())
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)


def test_parameters_unfrozen_later_are_noticed(comm):
    a, b = Slope(), Slope().requires_grad_(False)
    model = torch.nn.ModuleList([a, b])
    optimizer = local(model)
    b.requires_grad_(True)
    (a(1.0) + b(1.0)).backward()
    with pytest.raises(RuntimeError, match="after unfreezing"):
        optimizer.step()
    with pytest.raises(ValueError, match="cannot be added"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})


def test_nan_on_one_rank_leaves_the_average_of_the_others(comm):
    c = slopes(comm)
    model = Slope()
    optimizer = local(model, 2)
    step(optimizer, model, c[comm.rank])
    last = comm.size - 1
    with pytest.raises(hvdlocal.NonFiniteError, match=rf"on rank {last} of {comm.size}"):
        step(optimizer, model, float("nan") if comm.rank == last else c[comm.rank])
    if comm.size > 1:
        torch.testing.assert_close(model.w.detach(), torch.full((10,), 5 - 2 * mean(c[:-1])))
        healthy = c[:-1]
        variance = mean([(x - mean(healthy)) ** 2 for x in healthy])
        assert optimizer.divergence == pytest.approx(10 * 4 * variance, abs=1e-5)
        assert optimizer.loss == pytest.approx(
            mean([x * 10 * (5 - i * x) for i in range(2) for x in healthy]), rel=1e-6
        )


def poison(model, comm, coordinate):
    """A gradient of ones, with one NaN on rank 0."""
    model.w.sum().backward()
    if comm.rank == 0:
        model.w.grad[coordinate] = float("nan")


def test_a_single_nan_coordinate_of_many_is_found(comm):
    """Where no coordinate is sampled, it is seen in the sum only, and in the momentum that is averaged too."""
    model = Slope(100_000)
    optimizer = local(model, 1, optimizer=sgd(model, lr=0.1, momentum=0.9), momentum="average")
    step(optimizer, model, 1.0)
    assert 77_777 not in optimizer._sample._where
    poison(model, comm, 77_777)
    with pytest.raises(hvdlocal.NonFiniteError, match=r"in the sum over all ranks .* no rank holds a usable model"):
        optimizer.step()


def test_a_nan_at_a_sampled_coordinate_takes_its_rank_out(comm):
    model = Slope(100_000)
    optimizer = local(model, 1, optimizer=sgd(model, lr=0.1, momentum=0.9), momentum="average")
    step(optimizer, model, 1.0)
    poison(model, comm, int(optimizer._sample._where[1234]))
    with pytest.raises(hvdlocal.NonFiniteError, match=rf"on rank 0 of {comm.size}"):
        optimizer.step()
    assert comm.size == 1 or bool(model.w.isfinite().all())
    optimizer.zero_grad()
    if comm.size > 1:
        step(optimizer, model, 1.0)  # and the run can go on: nothing of the NaN is left
        assert bool(model.w.isfinite().all())


def test_the_rank_that_was_nan_has_the_averaged_moments(comm):
    model = Slope(10)
    optimizer = local(model, 1, optimizer=sgd(model, lr=0.1, momentum=0.9), momentum="average")
    step(optimizer, model, 1.0)
    with pytest.raises(hvdlocal.NonFiniteError):
        step(optimizer, model, float("nan") if comm.rank == 0 else 2.0)
    if comm.size > 1:
        moment = optimizer.state[model.w]["momentum_buffer"]
        torch.testing.assert_close(moment, torch.full((10,), 0.9 * 1.0 + 2.0))


def test_a_late_nan_voids_the_statistics_too(comm):
    """The first gradient of the round was fine on every rank, but a rank that is no longer finite takes all back."""
    model = Slope(10)
    optimizer = local(model, 2, optimizer=sgd(model, lr=0.1), scaling=hvdlocal.LocalAdaScale())
    step(optimizer, model, 1.0)
    with pytest.raises(hvdlocal.NonFiniteError):
        step(optimizer, model, float("nan") if comm.rank == 0 else 1.0)
    assert optimizer.grad_sqr is None


def test_a_model_put_back_after_it_was_lost_is_averaged_again(comm):
    model = Slope(10)
    optimizer = local(model, 1, optimizer=sgd(model, lr=0.1))
    with pytest.raises(hvdlocal.NonFiniteError, match="no rank holds"):
        step(optimizer, model, float("nan"))
    with torch.no_grad():
        model.w.fill_(5.0)
    step(optimizer, model, 1.0)
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 4.9))


def test_nan_gradient_without_recorded_loss_stops_the_synchronous_step(comm):
    model = Slope(numel=4)
    optimizer = hvdlocal.SynchronousOptimizer(sgd(model), model)
    model(float("nan") if comm.rank == 0 else 1.0).backward()
    with pytest.raises(hvdlocal.NonFiniteError, match="in the sum over"):
        optimizer.step()
    assert torch.equal(model.w.detach(), torch.full((4,), 5.0))


def test_adacomm_with_nan_everywhere_says_nan(comm):
    model = Slope()
    optimizer = local(model, hvdlocal.AdaComm(1))
    with pytest.raises(hvdlocal.NonFiniteError, match="no rank holds"):
        step(optimizer, model, float("inf"))


def test_nan_everywhere_names_all_ranks(comm):
    model = Slope()
    optimizer = local(model, 1)
    ranks = ", ".join(map(str, range(comm.size)))
    with pytest.raises(hvdlocal.NonFiniteError, match=rf"{ranks} of {comm.size}.*no rank holds"):
        step(optimizer, model, float("inf"))
