"""What a loop brings along from Horovod or from a bare optimizer, and what would go its own way without a word."""

import warnings

import pytest
import torch
from support.models import Slope, backward, everywhere_equal, flat, local, mean, sgd, slopes, small_network, step
from torch.distributed.checkpoint import state_dict as torch_state_dict

import hvdlocal


def synchronous(model, **settings):
    return hvdlocal.SynchronousOptimizer(sgd(model), model, **settings)


BOTH = pytest.mark.parametrize("wrap", [local, synchronous], ids=["local", "synchronous"])


# -- Horovod's leftovers -------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_broadcast_optimizer_state(comm, wrap, momentum):
    """It would count a step with zero gradients, and a gain of K would follow from G = 0."""
    hvd = pytest.importorskip("horovod.torch")
    model = Slope()
    inner = sgd(model, momentum=momentum, weight_decay=0.1)
    make = hvdlocal.SynchronousOptimizer if wrap is synchronous else local
    optimizer = make(inner, model) if wrap is synchronous else make(model, optimizer=inner)
    with pytest.raises(RuntimeError, match=r"broadcast_optimizer_state takes a step.*Delete that line"):
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer.progress == 0
    assert torch.equal(model.w.detach(), torch.full((10,), 5.0))


@BOTH
def test_torchs_own_way_of_getting_the_state(comm, wrap):
    model = Slope()
    optimizer = wrap(model)
    with pytest.raises(RuntimeError, match=r"state_dict\(\) and load_state_dict\(\)"):
        torch_state_dict.get_optimizer_state_dict(model, optimizer)
    optimizer.zero_grad()
    step(optimizer, model, 1.0)
    assert optimizer.progress == 1


def test_torchs_own_way_of_getting_the_state_of_a_run_under_way(comm):
    """There are moments, so that no step is taken; the part under "hvdlocal" would still be left out."""
    model = Slope()
    optimizer = local(model, optimizer=sgd(model, momentum=0.9))
    step(optimizer, model, 1.0)
    with pytest.raises(RuntimeError, match=r"state_dict\(\) and load_state_dict\(\)"):
        torch_state_dict.get_optimizer_state_dict(model, optimizer)
    with pytest.raises(RuntimeError, match=r"state_dict\(\) and load_state_dict\(\)"):
        torch_state_dict.get_state_dict(model, optimizer)


def test_broadcast_optimizer_state_of_the_wrapped_optimizer(comm):
    hvd = pytest.importorskip("horovod.torch")
    model = Slope()
    optimizer = local(model)
    with pytest.raises(RuntimeError, match=r"broadcast_optimizer_state takes a step.*Delete that line"):
        hvd.broadcast_optimizer_state(optimizer.optimizer, root_rank=0)


@BOTH
def test_skip_synchronize(comm, wrap):
    optimizer = wrap(Slope())
    with pytest.raises(RuntimeError, match=r"delete skip_synchronize\(\).*max_norm"), optimizer.skip_synchronize():
        pass


def test_synchronize_before_every_step_is_told(comm):
    model = Slope()
    optimizer = local(model, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            model(1.0).backward()
            optimizer.synchronize()
            optimizer.step()
    told = [str(one.message) for one in caught if "three rounds in succession" in str(one.message)]
    assert len(told) == (1 if comm.rank == 0 else 0)


@BOTH
def test_synchronize_inside_every_accumulation(comm, wrap):
    """Each call takes away the only micro-batch, so the model would never move."""
    model = Slope()
    optimizer = wrap(model, accumulate=2)

    def loop():
        for _ in range(3):
            model(1.0).backward()
            optimizer.synchronize()
            optimizer.step()

    with pytest.raises(RuntimeError, match="nothing is ever trained"):
        loop()


@BOTH
def test_synchronize_inside_an_accumulation_now_and_then(comm, wrap):
    """Before an evaluation it may take a micro-batch away: 3 whole steps of gradient 1 remain of 9 calls."""
    model = Slope()
    optimizer = wrap(model, accumulate=2)
    for _ in range(3):
        for _ in range(3):
            optimizer.zero_grad()
            model(1.0).backward()
            optimizer.step()
        optimizer.synchronize()
    assert torch.equal(model.w.detach(), torch.full((10,), 2.0))


def test_horovods_optimizer_inside(comm):
    hvd = pytest.importorskip("horovod.torch")
    if comm.backend != "horovod":
        return
    model = Slope()
    inner = hvd.DistributedOptimizer(sgd(model), named_parameters=model.named_parameters())
    with pytest.raises(ValueError, match=r"hvd.DistributedOptimizer.*delete that line"):
        hvdlocal.LocalOptimizer(inner, model, period=hvdlocal.ConstantPeriod(2))


@BOTH
def test_data_parallelism_inside(comm, wrap):
    """Its class alone is looked at, so that no process group is needed here."""

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = Slope()

    Wrapped.__module__ = torch.nn.parallel.DistributedDataParallel.__module__
    with pytest.raises(ValueError, match=r"the model's part 'body' is a Wrapped, which communicates.*that it wraps"):
        wrap(torch.nn.ModuleDict({"body": Wrapped()}))


def test_two_optimizers_over_one_module(comm):
    """As in a GAN: batch norm's statistics can be averaged by one of them only."""
    model = torch.nn.ModuleDict({"a": Slope(), "b": Slope(), "norm": torch.nn.BatchNorm1d(2)})
    first = local(model, optimizer=sgd(model["a"]))
    with pytest.raises(ValueError, match=r"buffer 'norm.running_mean' is averaged by another LocalOptimizer"):
        local(model, optimizer=sgd(model["b"]))
    second = local(model, optimizer=sgd(model["b"]), buffers="local")
    for optimizer, name in ((first, "a"), (second, "b")):
        step(optimizer, model[name], slopes(comm)[comm.rank])
        torch.testing.assert_close(model[name].w.detach(), torch.full((10,), 5 - mean(slopes(comm))))


def test_a_model_wrapped_again(comm):
    """In a notebook the first optimizer is still there when the cell runs again."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    first = local(model)
    second = local(model)
    model(torch.randn(3, 2)).sum().backward()
    second.step()
    assert everywhere_equal(comm, flat(model))
    with pytest.raises(RuntimeError, match="no longer lies"):
        first.step()


# -- shared with the wrapped optimizer ---------------------------------------------------------------------------------


@BOTH
def test_the_wrapped_optimizers_own_load_state_dict(comm, wrap):
    """The order in which many scripts resume: the rates and moments loaded are those that a step uses."""
    c = mean(slopes(comm))
    model = Slope()
    inner = sgd(model, lr=1.0)
    saved = sgd(Slope(), lr=0.25).state_dict()
    optimizer = hvdlocal.SynchronousOptimizer(inner, model) if wrap is synchronous else local(model, optimizer=inner)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    inner.load_state_dict(saved)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    step(optimizer, model, slopes(comm)[comm.rank])
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 5 - 0.25 * c))
    scheduler.step()
    step(optimizer, model, slopes(comm)[comm.rank])
    assert inner.param_groups[0]["lr"] == 0.125
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 5 - 0.375 * c))


def test_the_gain_is_applied_after_the_wrapped_optimizer_was_loaded(comm):
    """Linear scaling: K times the base rate."""
    model = Slope()
    inner = sgd(model, lr=1.0)
    optimizer = local(model, optimizer=inner, scaling=hvdlocal.LinearScaling(warmup=0))
    inner.load_state_dict(sgd(Slope(), lr=0.5).state_dict())
    step(optimizer, model, 1.0)
    assert optimizer.gain == comm.size
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 5 - 0.5 * comm.size))


def test_a_wrapped_state_is_not_loaded_into_the_optimizer_inside(comm):
    model = Slope()
    inner = sgd(model)
    optimizer = local(model, optimizer=inner)
    with pytest.raises(ValueError, match="load it with the LocalOptimizer's load_state_dict"):
        inner.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())


def test_the_optimizer_inside_is_not_stepped_by_itself(comm):
    model = Slope()
    inner = sgd(model)
    optimizer = local(model, optimizer=inner)
    model(1.0).backward()
    with pytest.raises(RuntimeError, match="call the step of the LocalOptimizer"):
        inner.step()
    optimizer.step()
    del optimizer
    inner.step()  # it is its owner's again
    assert torch.equal(model.w.detach(), torch.full((10,), 3.0))


class Halving(torch.optim.SGD):
    """Halves its own learning rate at every step, as schedule-free and D-adapted optimizers change theirs."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["lr"] = group["lr"] * 0.5


@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("scaling", [hvdlocal.NoScaling(), hvdlocal.LinearScaling(warmup=0)], ids=["none", "linear"])
def test_a_learning_rate_that_the_optimizer_writes(comm, lr, scaling):
    """Rates 1, 1/2, 1/4 (times the gain) add up to 1.75 (times the gain), and the base rate ends at 1/8."""
    model = Slope()
    optimizer = local(model, 3, optimizer=Halving(model.parameters(), lr=lr, foreach=False), scaling=scaling)
    for _ in range(3):
        step(optimizer, model, 1.0)
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 5 - 1.75 * optimizer.gain))
    assert float(optimizer.param_groups[0]["lr"]) == 0.125


def test_a_learning_rate_that_the_optimizer_writes_in_place(comm):
    class InPlace(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.param_groups[0]["lr"].mul_(0.5)

    model = Slope()
    inner = InPlace(model.parameters(), lr=torch.tensor(1.0), foreach=False)
    optimizer = local(model, 3, optimizer=inner, scaling=hvdlocal.LinearScaling(warmup=0))
    for _ in range(3):
        step(optimizer, model, 1.0)
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 5 - 1.75 * comm.size))


def test_momentum_that_is_switched_on_later(comm):
    """Nothing has room for the new moments, so they would never be averaged."""
    model = Slope()
    optimizer = local(model, 1, optimizer=sgd(model), momentum="average")
    step(optimizer, model, 1.0)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(RuntimeError, match=r"momentum_buffer.*build the optimizer with"):
        step(optimizer, model, 1.0)


@BOTH
def test_hooks_of_state_dict(comm, wrap):
    model = Slope()
    optimizer = wrap(model)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda one: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda one, state: {**state, "mine": 7})
    optimizer.register_load_state_dict_pre_hook(lambda one, state: calls.append(state.pop("mine")))
    optimizer.register_load_state_dict_post_hook(lambda one: calls.append("after loading"))
    state = optimizer.state_dict()
    assert state["mine"] == 7
    optimizer.load_state_dict(state)
    assert calls == ["before saving", 7, "after loading"]
    assert state["mine"] == 7  # the caller's state is not touched


# -- the learning rate and H -------------------------------------------------------------------------------------------


def test_the_rule_for_the_period_sees_the_largest_rate(comm):
    """Layer-wise rates: the first group's 1e-6 would mean H = 4e10."""
    model = torch.nn.ModuleList([Slope(), Slope()])
    groups = [{"params": [model[0].w], "lr": 1e-6}, {"params": [model[1].w], "lr": 0.1}]
    optimizer = local(model, hvdlocal.QSR(alpha=0.2, h_base=1), optimizer=torch.optim.SGD(groups, lr=1.0))
    (model[0](1.0) + model[1](1.0)).backward()
    optimizer.step()
    assert optimizer.period == 4


def test_the_rule_for_the_period_sees_no_rate_that_moves_nothing(comm):
    model = torch.nn.ModuleList([Slope().requires_grad_(False), Slope()])
    groups = [{"params": [model[0].w], "lr": 10.0}, {"params": [model[1].w], "lr": 0.1}, {"params": [], "lr": 10.0}]
    optimizer = local(model, hvdlocal.QSR(alpha=0.2, h_base=1), optimizer=torch.optim.SGD(groups, lr=1.0))
    model[1](1.0).backward()
    optimizer.step()
    assert optimizer.period == 4


def test_a_warm_up_that_the_rule_does_not_know(comm):
    """H = (0.2/0.0001)² = 4e6 in the first round: ended after 100 (H_base + 1) steps, with a word from rank 0."""
    model = Slope()
    optimizer = local(model, hvdlocal.QSR(alpha=0.2, h_base=4), optimizer=sgd(model, lr=1e-4))
    model(0.0).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert optimizer.period == 500
    told = [str(one.message) for one in caught if "warming up, tell the rule" in str(one.message)]
    assert len(told) == (1 if comm.rank == 0 else 0)


def test_a_learning_rate_of_zero_at_the_start(comm):
    model = Slope()
    optimizer = local(model, hvdlocal.QSR(alpha=0.2, h_base=4), optimizer=sgd(model, lr=0.0))
    model(0.0).backward()
    with pytest.raises(ValueError, match="let the warm-up begin above 0"):
        optimizer.step()


def test_a_learning_rate_that_is_no_number(comm):
    model = Slope()
    optimizer = local(model, 4)
    optimizer.param_groups[0]["lr"] = float("nan")
    model(0.0).backward()
    with pytest.raises(ValueError, match="learning rate of parameter group 0 is nan"):
        optimizer.step()


def test_the_longest_round_so_far_is_part_of_the_state(comm):
    model = small_network()
    optimizer = local(model, hvdlocal.QSR(alpha=0.2, h_base=1), optimizer=sgd(model, lr=0.02))  # H = 100
    backward(model, 0)
    optimizer.step()
    again = local(small_network(), hvdlocal.QSR(alpha=0.2, h_base=1))
    again.load_state_dict(optimizer.state_dict())
    assert again._planner.longest == 100
