"""state_dict: a run that is interrupted anywhere continues with the same bits."""

import io

import pytest
import torch
from support.models import Slope, backward, flat, local, sgd, small_network, step

import hvdlocal


def make(kind, model):
    sgd_momentum = sgd(model, lr=0.05, momentum=0.9)
    if kind == "local-ada":
        return local(model, 4, optimizer=sgd_momentum, scaling=hvdlocal.LocalAdaScale(), momentum="average")
    if kind == "local-ada-nostale-accumulated":
        scaling = hvdlocal.LocalAdaScale(stale=False, statistics="exact")
        return local(model, 2, optimizer=sgd_momentum, scaling=scaling, accumulate=3)
    if kind == "adamw-qsr":
        adamw = torch.optim.AdamW(model.parameters(), lr=0.01)
        return local(model, hvdlocal.QSR(alpha=0.02, h_base=2), optimizer=adamw, scaling=hvdlocal.LocalAdaScale())
    if kind == "adacomm":
        return local(model, hvdlocal.AdaComm(3, max_period=8), optimizer=sgd_momentum)
    return hvdlocal.SynchronousOptimizer(sgd_momentum, model, accumulate=3, scaling=hvdlocal.AdaScale())


def train(comm, optimizer, model, steps):
    for i in steps:
        optimizer.zero_grad()
        optimizer.record_loss(backward(model, seed=100 * i + comm.rank))
        optimizer.step()


@pytest.mark.parametrize("kind", ["local-ada", "local-ada-nostale-accumulated", "adamw-qsr", "adacomm", "acc-ada"])
@pytest.mark.parametrize("interrupt", [1, 4, 6, 7])
def test_resume_is_bit_identical(comm, kind, interrupt):
    model = small_network()
    whole = make(kind, model)
    train(comm, whole, model, range(14))

    first = small_network()
    before = make(kind, first)
    train(comm, before, first, range(interrupt))
    saved = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": before.state_dict()}, saved)

    second = small_network(seed=1)
    after = make(kind, second)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    second.load_state_dict(state["model"])
    after.load_state_dict(state["optimizer"])
    train(comm, after, second, range(interrupt, 14))

    assert torch.equal(flat(second), flat(model))
    for name in ("progress", "gain", "period", "round", "steps_in_round", "grad_sqr", "grad_var", "divergence", "loss"):
        assert getattr(after, name) == getattr(whole, name), name


def test_states_that_do_not_fit_are_refused(comm):
    model = Slope()
    optimizer = local(model, 4)
    step(optimizer, model, 1.0)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="not that of a SynchronousOptimizer"):
        hvdlocal.SynchronousOptimizer(sgd(model), model).load_state_dict(state)
    with pytest.raises(ValueError, match="bare optimizer"):
        optimizer.load_state_dict(sgd(model).state_dict())
    state["hvdlocal"]["num_workers"] = comm.size + 1
    with pytest.raises(ValueError, match=rf"middle of a round by rank {comm.rank} of {comm.size + 1}"):
        optimizer.load_state_dict(state)
    state["hvdlocal"] |= {"num_workers": comm.size, "rank": comm.rank + 1}
    with pytest.raises(ValueError, match=rf"by rank {comm.rank + 1} of {comm.size} .*each rank's own"):
        optimizer.load_state_dict(state)

    accumulating = local(model, accumulate=4)
    step(accumulating, model, 1.0)
    with pytest.raises(ValueError, match="accumulation of 4 micro-batches"):
        local(model, accumulate=2).load_state_dict(accumulating.state_dict())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_loading_in_the_middle_of_an_accumulation(comm, set_to_none):
    """The gradients of before are views of the buffer that the state is restored into."""
    model = Slope()
    optimizer = local(model, accumulate=2)
    step(optimizer, model, 4.0)
    state = optimizer.state_dict()
    step(optimizer, model, 4.0)  # a step: w = 5 − 4
    optimizer.load_state_dict(state)
    optimizer.zero_grad(set_to_none=set_to_none)
    model(2.0).backward()
    optimizer.step()
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 5.0 - 4 - 3))
