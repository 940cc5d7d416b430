"""Averages and statistics of tensors on the device, against closed forms and brute force over all ranks."""

import pytest
import torch
from support.models import Slope, flat, flat_gradient, local, mean, sgd, slopes, step

import hvdlocal
from hvdlocal.averaging.sketch import GradientSketch
from hvdlocal.models import build_model


def equal_everywhere(comm, tensor) -> bool:
    """Whether all ranks hold the same bits."""
    return len(set(comm.gather(tensor.detach().cpu().contiguous().numpy().tobytes(), "test.bits"))) == 1


def assert_is(tensor, value, **tolerances):
    """That every element of a tensor on the device is `value`."""
    torch.testing.assert_close(tensor.detach().cpu(), torch.full(tensor.shape, float(value)), **tolerances)


def test_an_average_is_the_mean_of_the_replicas(comm, device):
    c = slopes(comm)
    model = Slope().to(device)
    optimizer = local(model, 4)
    for _ in range(3):
        step(optimizer, model, c[comm.rank])
    assert_is(model.w, 5 - 3 * c[comm.rank])
    step(optimizer, model, c[comm.rank])
    assert model.w.device == device
    assert_is(model.w, 5 - 4 * mean(c))
    assert equal_everywhere(comm, model.w)
    assert optimizer.divergence == pytest.approx(160 * mean([(x - mean(c)) ** 2 for x in c]), rel=1e-5)
    assert optimizer.loss == pytest.approx(mean([x * 10 * (5 - i * x) for i in range(4) for x in c]), rel=1e-6)


def test_data_parallelism_steps_on_the_mean_gradient(comm, device):
    c = slopes(comm)
    model = Slope().to(device)
    optimizer = hvdlocal.SynchronousOptimizer(sgd(model), model, accumulate=2)
    for factor in (1.0, 3.0):
        step(optimizer, model, factor * c[comm.rank])
    assert_is(model.w, 5 - 2 * mean(c))
    assert equal_everywhere(comm, model.w)


def resnet(device, rank=0):
    torch.manual_seed(0)
    model = build_model("resnet9_narrow", 10, (32, 32, 3)).to(device)
    torch.manual_seed(rank + 1)
    return model


def backward(model, device):
    x, y = torch.randn(8, 3, 32, 32).to(device), torch.randint(10, (8,)).to(device)
    torch.nn.functional.cross_entropy(model(x), y).backward()


def everyones_gradients(comm, model):
    """float64 (K, parameters), on the CPU of every rank."""
    mine = flat_gradient(model).cpu().double()
    return torch.stack([torch.frombuffer(bytearray(one), dtype=torch.float64) for one in gathered(comm, mine)])


def gathered(comm, tensor):
    return comm.gather(tensor.numpy().tobytes(), "test.gradients")


@pytest.mark.parametrize("stale", [True, False])
@pytest.mark.parametrize("statistics", ["exact", "sketch"])
def test_statistics(comm, device, statistics, stale):
    """Exact ones equal brute force; of a sketch, its projection equals that of the CPU, and its estimate is near."""
    model = resnet(device, comm.rank)
    scaling = hvdlocal.LocalAdaScale(statistics=statistics, stale=stale, smoothing=0.0)
    optimizer = local(model, 2, optimizer=sgd(model, lr=0.01), scaling=scaling)
    backward(model, device)
    everyone = everyones_gradients(comm, model)
    for _ in range(2):
        optimizer.step()
    if comm.size == 1:
        assert optimizer.grad_var is None
        return
    k = comm.size
    truth = hvdlocal.gradient_statistics(float(everyone.square().sum()) / k, float(everyone.mean(0).square().sum()), k)
    if statistics == "exact":
        assert (optimizer.grad_sqr, optimizer.grad_var) == pytest.approx((max(truth[0], 0.0), truth[1]), rel=1e-3)
        return
    numels = [p.numel() for p in model.parameters()]
    size = optimizer._statistics.size
    sketch = GradientSketch(numels, size, torch.device("cpu"))
    rows = []
    for gradient in everyone.float():
        # The parameters' memory order is that of their shapes here, so that a piece of the vector is a gradient.
        rows.append(torch.empty(size))
        sketch.project(list(gradient.split(numels)), rows[-1])
    projected = torch.stack(rows).double()
    expected = hvdlocal.gradient_statistics(
        float(projected.square().sum()) / k, float(projected.mean(0).square().sum()), k
    )
    assert (optimizer.grad_sqr, optimizer.grad_var) == pytest.approx((max(expected[0], 0.0), expected[1]), rel=1e-3)
    assert optimizer.grad_var == pytest.approx(truth[1], rel=6 * (2 / size) ** 0.5)


@pytest.mark.parametrize("policy", ["local", "average", "reset"])
def test_moments(comm, device, policy):
    c = slopes(comm)
    model = Slope().to(device)
    optimizer = local(model, 2, optimizer=sgd(model, momentum=0.5), momentum=policy)
    for _ in range(2):
        step(optimizer, model, c[comm.rank])
    if policy == "reset":
        assert not optimizer.state
    else:
        assert_is(optimizer.state[model.w]["momentum_buffer"], 1.5 * (mean(c) if policy == "average" else c[comm.rank]))
    assert_is(model.w, 5 - 2.5 * mean(c))


def test_moments_of_adamw_are_averaged(comm, device):
    c = slopes(comm)
    model = Slope().to(device)
    optimizer = local(model, 1, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1), momentum="average")
    step(optimizer, model, c[comm.rank])
    state = optimizer.state[model.w]
    assert_is(state["exp_avg"], 0.1 * mean(c))
    assert_is(state["exp_avg_sq"], 0.001 * mean([x * x for x in c]))


@pytest.mark.parametrize("policy", ["average", "local", "reestimate"])
def test_buffers(comm, device, policy):
    """Rank k feeds batches of mean k + 1; running_mean after 2 steps from 0 is 0.19 (k + 1)."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).to(device)
    optimizer = local(model, 2, optimizer=sgd(model, lr=0.0), buffers=policy)
    x = (torch.tensor([[-1.0], [1.0]]).expand(2, 3) + comm.rank + 1).to(device)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    everyone = mean([rank + 1 for rank in range(comm.size)])
    if policy == "reestimate":
        optimizer.reestimate_buffers([x])
        assert_is(model[0].running_mean, everyone)
    else:
        assert_is(model[0].running_mean, 0.19 * (everyone if policy == "average" else comm.rank + 1))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_overflow_of_float16_on_one_rank(comm, device, accumulate):
    """GradScaler: that rank skips its step, the others do not, all average together: 5 − (1 + (K−1)/K)."""
    model = Slope(numel=4).to(device)
    optimizer = local(model, 2, accumulate=accumulate, scaling=hvdlocal.LocalAdaScale(stale=False))
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    last = comm.size - 1
    for i in range(2):
        for micro_batch in range(accumulate):
            optimizer.zero_grad()
            overflow = i == 0 and micro_batch == 0 and comm.rank == last
            scaler.scale(model(float("inf") if overflow else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_is(model.w, 5 - (1 + last / comm.size))
    assert optimizer.grad_var is None, "statistics of an overflow are void on every rank"
    assert scaler.get_scale() == (2.0**9 if comm.rank == last else 2.0**10)


def test_a_rank_that_is_lost_leaves_the_others_their_average(comm, device):
    c = slopes(comm)
    model = Slope().to(device)
    optimizer = local(model, 2)
    last = comm.size - 1
    step(optimizer, model, c[comm.rank])
    with pytest.raises(hvdlocal.NonFiniteError, match=rf"on rank {last} of {comm.size}"):
        step(optimizer, model, float("nan") if comm.rank == last else c[comm.rank])
    if last:
        assert_is(model.w, 5 - 2 * mean(c[:last]))


def test_all_ranks_start_from_rank_0_and_end_with_the_same_bits(comm, device):
    torch.manual_seed(comm.rank)
    model = build_model("resnet9_narrow", 10, (32, 32, 3)).to(device)
    optimizer = local(model, 3, optimizer=sgd(model, lr=0.01, momentum=0.9), scaling=hvdlocal.LocalAdaScale())
    assert equal_everywhere(comm, flat(model))
    for _ in range(7):
        optimizer.zero_grad()
        backward(model, device)
        optimizer.step()
    assert comm.size == 1 or not equal_everywhere(comm, flat(model))
    optimizer.synchronize()
    assert equal_everywhere(comm, flat(model))
    assert torch.isfinite(flat(model)).all()
