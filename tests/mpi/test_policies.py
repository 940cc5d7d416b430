"""Momentum, buffers, parameter groups, and what torch offers around an optimizer."""

import pytest
import torch
from support.models import Slope, everywhere_equal, flat, local, mean, sgd, slopes, small_network, step

import hvdlocal
import hvdlocal.averaging


def moment(optimizer, model, name):
    return optimizer.state[model.w][name]


def test_momentum_stays_local(comm):
    c = slopes(comm)
    model = Slope()
    optimizer = local(model, 2, optimizer=sgd(model, momentum=0.5), momentum="local")
    for _ in range(2):
        step(optimizer, model, c[comm.rank])
    torch.testing.assert_close(moment(optimizer, model, "momentum_buffer"), torch.full((10,), 1.5 * c[comm.rank]))


def test_momentum_is_averaged(comm):
    c = slopes(comm)
    model = Slope()
    optimizer = local(model, 2, optimizer=sgd(model, momentum=0.5), momentum="average")
    for _ in range(2):
        step(optimizer, model, c[comm.rank])
    torch.testing.assert_close(moment(optimizer, model, "momentum_buffer"), torch.full((10,), 1.5 * mean(c)))
    step(optimizer, model, 0.0)  # v = 0.75 c̄, w moves by it
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 5 - mean(c) * (1 + 1.5 + 0.75)))


def test_momentum_is_reset(comm):
    c = slopes(comm)
    model = Slope()
    optimizer = local(model, 2, optimizer=sgd(model, momentum=0.5), momentum="reset")
    for _ in range(2):
        step(optimizer, model, c[comm.rank])
    step(optimizer, model, 0.0)
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 5 - mean(c) * (1 + 1.5)))


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_moments_are_averaged(comm, make, amsgrad):
    c = slopes(comm)
    model = Slope()
    adam = make(model.parameters(), lr=0.1, betas=(0.5, 0.75), amsgrad=amsgrad)
    optimizer = local(model, 2, optimizer=adam, momentum="average")
    for _ in range(2):
        step(optimizer, model, c[comm.rank])
    # m = (1 − β²)·c and v = (1 − β²)·c² after two equal gradients
    torch.testing.assert_close(moment(optimizer, model, "exp_avg"), torch.full((10,), 0.75 * mean(c)))
    second = (1 - 0.75**2) * mean([x * x for x in c])
    torch.testing.assert_close(moment(optimizer, model, "exp_avg_sq"), torch.full((10,), second))
    if amsgrad:
        torch.testing.assert_close(moment(optimizer, model, "max_exp_avg_sq"), torch.full((10,), second))
    assert moment(optimizer, model, "step") == 2


def test_moments_of_unknown_optimizers_are_refused(comm):
    model = Slope()
    with pytest.raises(ValueError, match=r"not for RMSprop: choose 'local' or 'reset'"):
        local(model, optimizer=torch.optim.RMSprop(model.parameters()), momentum="average")


def batch_norm_run(comm, buffers, steps=2):
    """Rank k feeds batches of mean k+1; running_mean after n steps from 0 is (1 − 0.9ⁿ)(k+1)."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    optimizer = local(model, 2, optimizer=sgd(model, lr=0.0), buffers=buffers)
    x = torch.tensor([[-1.0], [1.0]]).expand(2, 3) + comm.rank + 1
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    return model, optimizer, x


def test_buffers_are_averaged_with_the_parameters(comm):
    before = comm.traffic.collectives
    model, *_ = batch_norm_run(comm, "average")
    expected = 0.19 * mean([rank + 1 for rank in range(comm.size)])
    torch.testing.assert_close(model[0].running_mean, torch.full((3,), expected))
    assert model[0].num_batches_tracked == 2
    assert everywhere_equal(comm, model[0].running_var)
    assert comm.size == 1 or comm.traffic.collectives - before >= 1


def test_buffers_stay_local(comm):
    model, *_ = batch_norm_run(comm, "local")
    torch.testing.assert_close(model[0].running_mean, torch.full((3,), 0.19 * (comm.rank + 1)))


def test_buffers_are_reestimated(comm):
    model, optimizer, x = batch_norm_run(comm, "reestimate")
    optimizer.synchronize()
    optimizer.reestimate_buffers([x, x + 2])
    expected = mean([rank + 2.0 for rank in range(comm.size)])
    torch.testing.assert_close(model[0].running_mean, torch.full((3,), expected))
    torch.testing.assert_close(model[0].running_var, torch.full((3,), 2.0))
    assert model[0].momentum == 0.1
    with pytest.raises(ValueError, match=rf"1 of {comm.size} ranks gave no batch"):
        optimizer.reestimate_buffers([] if comm.rank == 0 else [x])
    plain = Slope()
    local(plain, buffers="reestimate").reestimate_buffers(iter([]))  # nothing to estimate


def test_parameter_groups_keep_their_rates(comm):
    """Both groups are scaled by the gain, and the groups show the base rates afterwards."""
    a, b = Slope(), Slope()
    model = torch.nn.ModuleList([a, b])
    inner = torch.optim.SGD([{"params": a.parameters()}, {"params": b.parameters(), "lr": 0.01}], lr=0.1)
    optimizer = local(model, 1, optimizer=inner, scaling=hvdlocal.LinearScaling(warmup=0))
    (a(1.0) + b(1.0)).backward()
    optimizer.step()
    torch.testing.assert_close(a.w.detach(), torch.full((10,), 5 - 0.1 * comm.size))
    torch.testing.assert_close(b.w.detach(), torch.full((10,), 5 - 0.01 * comm.size))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]


def test_frozen_and_tied_parameters(comm):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Linear(4, 4, bias=False)
            self.decoder = torch.nn.Linear(4, 4, bias=False)
            self.decoder.weight = self.encoder.weight
            self.frozen = torch.nn.Linear(4, 1000)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.decoder(self.encoder(x)))

    torch.manual_seed(comm.rank)
    model = Tied()
    optimizer = local(model, 2, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
    before, frozen = comm.traffic.bytes, model.frozen.weight.clone()
    for i in range(2):
        optimizer.zero_grad()
        model(torch.full((2, 4), float(comm.rank + i))).sum().backward()
        optimizer.step()
    assert model.decoder.weight.data_ptr() == model.encoder.weight.data_ptr()
    assert everywhere_equal(comm, model.encoder.weight.detach())
    assert torch.equal(model.frozen.weight, frozen)
    assert comm.traffic.bytes - before < 1000, "the 4,000 frozen weights do not travel"


def test_channels_last_parameters_keep_their_format(comm):
    model = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    optimizer = local(model, 2, optimizer=sgd(model, lr=0.1), scaling=hvdlocal.LocalAdaScale())
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    for i in range(2):
        optimizer.zero_grad()
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(10 * i + comm.rank))
        model(x.to(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()
    assert everywhere_equal(comm, model.weight.detach().contiguous())


def test_bfloat16_autocast(comm):
    model = small_network()
    optimizer = local(model, 2, optimizer=sgd(model, lr=0.1), scaling=hvdlocal.LocalAdaScale())
    for i in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (
                model(torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(i + comm.rank)))
                .float()
                .square()
                .mean()
            )
        loss.backward()
        optimizer.step()
    assert everywhere_equal(comm, flat(model))
    assert torch.isfinite(flat(model)).all()


def test_clipping(comm):
    model = Slope(numel=4)
    optimizer = local(model, 1, max_norm=1.0)
    step(optimizer, model, 100.0)
    torch.testing.assert_close(model.w.detach(), torch.full((4,), 5 - 0.5))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_grad_scaler_overflow_on_one_rank(comm, accumulate):
    """The overflowing rank skips its step, the others do not, all average together: 5 − (K−1)/K·c."""
    model = Slope(numel=4)
    optimizer = local(model, 2, accumulate=accumulate, scaling=hvdlocal.LocalAdaScale(stale=False))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    last = comm.size - 1
    for i in range(2):
        for micro_batch in range(accumulate):
            optimizer.zero_grad()
            overflow = i == 0 and micro_batch == 0 and comm.rank == last
            scaler.scale(model(float("inf") if overflow else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert optimizer.round == 1
    torch.testing.assert_close(model.w.detach(), torch.full((4,), 5 - (1 + last / comm.size)))
    assert optimizer.grad_var is None, "statistics of an overflow are void on every rank"
    assert scaler.get_scale() == (2.0**9 if comm.rank == last else 2.0**10)


def test_grad_scaler_when_one_rank_has_no_gradient(comm):
    model = Slope(numel=4)
    optimizer = local(model, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    if comm.rank == 0:
        scaler.scale(model(1.0)).backward()
    else:
        scaler.scale(torch.zeros(1))
    scaler.step(optimizer)
    torch.testing.assert_close(model.w.detach(), torch.full((4,), 5 - 1 / comm.size))


def test_grad_scaler_after_an_error(comm):
    """What GradScaler left behind in a step that failed does not scale the next one."""
    model = Slope(numel=4)
    optimizer = local(model, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.record_loss(float("nan"))
    scaler.scale(model(1.0)).backward()
    with pytest.raises(hvdlocal.NonFiniteError):
        scaler.step(optimizer)
    start = model.w.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.zero_grad()
    scaler.scale(model(1.0)).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(model.w.detach(), start - 1)


def test_void_statistics_with_finite_gradients(comm):
    """unscale_ by hand: the overflow was clipped away, but the gradient is not to be believed."""
    model = Slope(numel=4)
    optimizer = local(model, 1, scaling=hvdlocal.LocalAdaScale())
    model(1.0).backward()
    optimizer.found_inf = torch.tensor(float(comm.rank == 0))
    optimizer.step()
    assert optimizer.grad_var is None


def test_buffers_behind_a_wrapper_that_renames_them(comm):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = torch.nn.Sequential(checkpoint_wrapper(torch.nn.BatchNorm1d(2, momentum=1.0)), torch.nn.Linear(2, 1))
    optimizer = local(model, 1, optimizer=sgd(model, lr=0.0))
    model(torch.tensor([[0.0], [2.0]]).expand(2, 2) + comm.rank).sum().backward()
    optimizer.step()
    (running_mean,) = (b for name, b in model.named_buffers() if name.endswith("running_mean"))
    torch.testing.assert_close(running_mean, torch.full((2,), 1.0 + mean(range(comm.size))))


def test_complex_and_other_buffers_start_equal(comm):
    model = Slope()
    model.register_buffer("phases", torch.full((3,), complex(comm.rank, 1)))
    model.register_buffer("mask", torch.tensor([comm.rank == 0, False]))
    local(model, buffers="local")
    assert torch.equal(model.phases, torch.full((3,), complex(0, 1)))
    assert model.mask.tolist() == [True, False]


def test_a_rule_of_the_users_own(comm):
    class Half(hvdlocal.averaging.Scaling):
        def __init__(self):
            self.factor = 0.5

        def gain(self, now):
            return self.factor

    model = Slope()
    optimizer = local(model, 1, scaling=Half())
    step(optimizer, model, 1.0)
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 4.5))


def test_schedulers_set_the_base_rate(comm):
    model = Slope()
    optimizer = local(model, 2, optimizer=sgd(model, lr=1.0))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(4):
        step(optimizer, model, 1.0)
        scheduler.step()
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 5 - (1 + 0.5 + 0.25 + 0.125)))


def test_a_schedule_of_progress_is_a_lambda_lr(comm):
    """The base schedule is a function of scale-invariant iterations, whatever the number of steps."""
    model = Slope()
    optimizer = local(model, 1, optimizer=sgd(model, lr=1.0), scaling=hvdlocal.LinearScaling(warmup=0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1 / (1 + optimizer.progress))
    for _ in range(3):
        step(optimizer, model, 0.0)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / (1 + 3 * comm.size))


def test_zero_grad_and_closures(comm):
    model = Slope()
    optimizer = local(model, 1)
    model(1.0).backward()
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(model.w.grad, torch.zeros(10))
    optimizer.zero_grad(set_to_none=True)
    assert model.w.grad is None

    def closure():
        optimizer.zero_grad()
        loss = model(1.0)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(50.0)
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 4.0))


@pytest.mark.parametrize("zero", ["always", "after a step", "to zero"])
def test_accumulation_does_not_depend_on_when_gradients_are_zeroed(comm, zero):
    model = Slope()
    optimizer = local(model, 1, accumulate=3)
    for i in range(6):
        if zero == "always" or i % 3 == 0:
            optimizer.zero_grad(set_to_none=zero != "to zero")
        model(float(i + comm.rank)).backward()
        optimizer.step()
    # steps on the means 1 and 4, plus the mean rank
    expected = 5 - (1 + 4 + 2 * mean(range(comm.size)))
    torch.testing.assert_close(model.w.detach(), torch.full((10,), expected))
    assert optimizer.round == 2
