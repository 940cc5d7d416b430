"""What large models need: averaging in pieces, and no memory of the model's size."""

import pytest
import torch
from support.models import Slope, local, mean, sgd, slopes, step

import hvdlocal
from hvdlocal.communicator import base

NEVER = 10**9


@pytest.mark.parametrize("statistics", ["sketch", "exact"])
def test_an_arena_beyond_the_limit_of_one_collective_is_averaged_in_pieces(comm, monkeypatch, statistics):
    numel = 5000
    whole, cut = Slope(numel), Slope(numel)
    optimizers = [local(model, 2, scaling=hvdlocal.LocalAdaScale(statistics=statistics)) for model in (whole, cut)]
    collectives = []
    for model, optimizer, limit in zip((whole, cut), optimizers, (base.MAX_ELEMENTS, 999), strict=True):
        monkeypatch.setattr(base, "MAX_ELEMENTS", limit)
        before = comm.traffic.collectives
        for _ in range(4):
            step(optimizer, model, slopes(comm)[comm.rank])
        collectives.append(comm.traffic.collectives - before)
    # A piece may be summed in another order than the whole, so not bit for bit.
    torch.testing.assert_close(whole.w, cut.w, rtol=1e-6, atol=0)
    for name in ("grad_sqr", "grad_var", "progress") if comm.size > 1 else ("progress",):
        one, other = (getattr(optimizer, name) for optimizer in optimizers)
        assert one == pytest.approx(other, rel=1e-5)
    assert collectives[0] == (2 if comm.size > 1 else 0)
    assert collectives[1] == collectives[0], "one averaging counts once, however many pieces it travels in"


@pytest.mark.parametrize("statistics", [None, "sketch", "exact"])
@pytest.mark.parametrize("momentum", ["local", "average"])
def test_an_averaging_allocates_nothing(comm, statistics, momentum):
    """Neither for the parameters (4 MB here) nor for statistics or moments: only for some scalars."""
    model = Slope(1_000_000)
    settings = {} if statistics is None else {"scaling": hvdlocal.LocalAdaScale(statistics=statistics)}
    optimizer = local(model, NEVER, optimizer=sgd(model, momentum=0.9), momentum=momentum, **settings)
    for _ in range(2):  # the first adopts the moments
        step(optimizer, model, 1.0)
        optimizer.synchronize()
    step(optimizer, model, 1.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.synchronize()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated < 4096


def test_replicas_stay_equal_and_right_for_many_steps(comm):
    """The mean over K of moves −lr·c_k·H, to float precision, whatever K."""
    model = Slope(1000)
    optimizer = local(model, 3, optimizer=sgd(model, lr=0.01))
    for _ in range(12):
        step(optimizer, model, slopes(comm)[comm.rank])
    assert model.w[0].item() == pytest.approx(5 - 0.01 * 12 * mean(slopes(comm)), rel=1e-5)
