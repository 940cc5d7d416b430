"""SynchronousOptimizer: data parallelism, accumulation and AdaScale."""

import json
from pathlib import Path

import pytest
import torch
from golden import adascale_run
from support.models import Slope, backward, batch, everywhere_equal, flat, mean, sgd, slopes, small_network, step

import hvdlocal


def synchronous(model, *, optimizer=None, **settings):
    return hvdlocal.SynchronousOptimizer(optimizer or sgd(model), model, **settings)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_it_equals_one_process_with_the_whole_batch(comm, make, accumulate):
    model, serial = small_network(), small_network()
    optimizer = synchronous(model, optimizer=make(model.parameters(), lr=0.01), accumulate=accumulate)
    reference = make(serial.parameters(), lr=0.01)
    for i in range(8):
        for micro_batch in range(accumulate):
            optimizer.zero_grad()
            backward(model, seed=100 * i + 10 * micro_batch + comm.rank)
            optimizer.step()
        reference.zero_grad()
        parts = [batch(100 * i + 10 * m + rank) for m in range(accumulate) for rank in range(comm.size)]
        x, y = zip(*parts, strict=True)
        torch.nn.functional.cross_entropy(serial(torch.cat(x)), torch.cat(y)).backward()
        reference.step()
    torch.testing.assert_close(flat(model), flat(serial), rtol=1e-4, atol=1e-5)
    assert everywhere_equal(comm, flat(model))
    assert optimizer.round == 8


@pytest.mark.parametrize(
    "scaling", [hvdlocal.NoScaling(), hvdlocal.AdaScale(), hvdlocal.LinearScaling(warmup=0)], ids=str
)
def test_one_collective_a_step(comm, scaling):
    model = Slope()
    optimizer = synchronous(model, accumulate=2, scaling=scaling)
    before = comm.traffic.collectives
    for _ in range(6):
        step(optimizer, model, 0.1)
    assert comm.traffic.collectives - before == (3 if comm.size > 1 else 0)


def test_adascale_statistics_have_their_closed_form(comm):
    """Micro-batch gradients c_k·1 and −c_k·2·1 in 10 dimensions."""
    c = slopes(comm)
    model = Slope()
    optimizer = synchronous(model, accumulate=2, scaling=hvdlocal.AdaScale(smoothing=0.0))
    step(optimizer, model, c[comm.rank])
    step(optimizer, model, -2 * c[comm.rank])
    gradients = [factor * x for factor in (1, -2) for x in c]
    grad_sqr, grad_var = hvdlocal.gradient_statistics(
        10 * mean([g * g for g in gradients]), 10 * mean(gradients) ** 2, len(gradients)
    )
    assert optimizer.grad_var == pytest.approx(grad_var, rel=1e-5)
    assert optimizer.grad_sqr == pytest.approx(max(grad_sqr, 0), rel=1e-4, abs=1e-4)
    gain = hvdlocal.gain_ratio(max(grad_sqr, 0), grad_var, len(gradients), 1)
    assert optimizer.gain == pytest.approx(gain, rel=1e-5), "used in the very step"
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 5 - gain * mean(gradients)))


def test_adascale_equals_fairscale_on_a_training_run(comm):
    """40 momentum-SGD steps of 12 micro-batches; numbers from FairScale 0.4.13 (tests/golden/adascale_run.py)."""
    golden = json.loads((Path(adascale_run.__file__).parent / "adascale.json").read_text())
    if adascale_run.MICRO_BATCHES % comm.size:
        pytest.skip(f"{adascale_run.MICRO_BATCHES} micro-batches cannot be dealt to {comm.size} ranks")
    accumulate = adascale_run.MICRO_BATCHES // comm.size
    model = adascale_run.model()
    optimizer = synchronous(
        model, optimizer=adascale_run.sgd(model), accumulate=accumulate, scaling=hvdlocal.AdaScale()
    )
    gains = []
    for i in range(adascale_run.STEPS):
        for micro_batch in range(accumulate):
            optimizer.zero_grad()
            adascale_run.loss(model, i, comm.rank * accumulate + micro_batch).backward()
            optimizer.step()
        gains.append(optimizer.gain)
    assert gains == pytest.approx(golden["gains"], rel=1e-5)
    assert flat(model).tolist() == pytest.approx(golden["parameters"], rel=1e-4, abs=1e-6)


def test_buffers_are_averaged_for_an_evaluation(comm):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3, momentum=1.0), torch.nn.Linear(3, 1))
    optimizer = synchronous(model)
    model(torch.tensor([[0.0], [2.0]]).expand(2, 3) + comm.rank).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model[0].running_mean, torch.full((3,), 1.0 + comm.rank))
    optimizer.synchronize()
    torch.testing.assert_close(model[0].running_mean, torch.full((3,), 1.0 + mean(range(comm.size))))


def test_a_parameter_without_gradient_counts_as_zero(comm):
    """Only rank 0 uses the second parameter."""
    a, b = Slope(), Slope()
    model = torch.nn.ModuleList([a, b])
    optimizer = synchronous(model)
    (a(1.0) + (b(1.0) if comm.rank == 0 else 0)).backward()
    optimizer.step()
    torch.testing.assert_close(b.w.detach(), torch.full((10,), 5 - 1 / comm.size))


def test_grad_scaler_overflow_on_one_rank_skips_the_step_everywhere(comm):
    model = Slope(numel=4)
    optimizer = synchronous(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for c in (float("inf") if comm.rank == 0 else 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(c)).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(model.w.detach(), torch.full((4,), 4.0))
    assert (optimizer.round, optimizer.progress) == (1, 1)


def test_nan_on_one_rank_stops_all_before_the_step(comm):
    model = Slope(numel=4)
    optimizer = synchronous(model)
    step(optimizer, model, 1.0)
    last = comm.size - 1
    with pytest.raises(hvdlocal.NonFiniteError, match=rf"on rank {last} of {comm.size} .*step before"):
        step(optimizer, model, float("nan") if comm.rank == last else 1.0)
    torch.testing.assert_close(model.w.detach(), torch.full((4,), 4.0))


def test_stop_clipping_and_dropped_micro_batches(comm):
    model = Slope(numel=4)
    optimizer = synchronous(model, accumulate=2, scaling=hvdlocal.AdaScale(), max_norm=1.0)
    step(optimizer, model, 50.0)
    optimizer.synchronize()  # drops it, with its norm
    if comm.rank == comm.size - 1:
        optimizer.request_stop()
    step(optimizer, model, 100.0)
    step(optimizer, model, 100.0)
    assert optimizer.stop_requested
    assert optimizer.grad_var == pytest.approx(1e-6), "equal gradients: nothing of the dropped one is left"
    torch.testing.assert_close(model.w.detach(), torch.full((4,), 4.5))
