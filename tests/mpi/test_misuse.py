"""Arguments and gradients that an optimizer cannot use: a sentence, where torch's own error would be no help."""

import math

import numpy as np
import pytest
import torch
from support.islands import with_islands
from support.models import Slope, local, mean, sgd, slopes, step

import hvdlocal


def synchronous(model, *, optimizer=None, **settings):
    return hvdlocal.SynchronousOptimizer(optimizer or sgd(model), model, **settings)


BOTH = pytest.mark.parametrize("make", [local, synchronous])

NO_RATES = [
    (None, "group 1 has no learning rate"),
    ("0.1", "group 1 has the learning rate '0.1'"),
    ([0.1], r"group 1 has the learning rate \[0.1\]"),
    (math.nan, "group 1 is nan"),
    (math.inf, "group 1 is inf"),
    (-0.1, "group 1 is -0.1"),
    (torch.tensor(math.nan), "group 1 is nan"),
    (torch.ones(2), "group 1 has the learning rate tensor"),
]


def two_groups():
    model = torch.nn.ModuleList([Slope(), Slope()])
    return model, torch.optim.SGD([{"params": part.parameters()} for part in model], lr=1.0)


@pytest.mark.parametrize(("rate", "message"), NO_RATES, ids=[str(rate) for rate, _ in NO_RATES])
@BOTH
def test_rates_that_are_no_numbers(comm, make, rate, message):
    model, inner = two_groups()
    inner.param_groups[1]["lr"] = rate
    with pytest.raises(ValueError, match=message):
        make(model, optimizer=inner)
    del inner.param_groups[1]["lr"]
    with pytest.raises(ValueError, match="group 1 has no learning rate"):
        make(model, optimizer=inner)


@pytest.mark.parametrize("rate", [None, math.nan, -1.0])
@BOTH
def test_a_schedule_that_loses_the_rate_in_the_middle_of_a_round(comm, make, rate):
    model, inner = two_groups()
    optimizer = make(model, optimizer=inner) if make is synchronous else make(model, 4, optimizer=inner)
    step(optimizer, model[0], 1.0)
    optimizer.param_groups[1]["lr"] = rate
    before = model[0].w.detach().clone()
    with pytest.raises(ValueError, match="parameter group 1"):
        step(optimizer, model[0], 1.0)
    assert torch.equal(model[0].w, before)


@pytest.mark.parametrize("rate", [0.5, 1, torch.tensor(0.5), np.float32(0.5), 0.0], ids=repr)
@BOTH
def test_rates_that_are_numbers(comm, make, rate):
    model = Slope()
    inner = sgd(model)
    inner.param_groups[0]["lr"] = rate
    optimizer = make(model, optimizer=inner)
    step(optimizer, model, slopes(comm)[comm.rank])
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 5 - float(rate) * mean(slopes(comm))))


NO_MODELS = [
    (lambda m: [m], "model is a list.*ModuleList"),
    (lambda m: {"net": m}, "model is a dict"),
    (lambda m: m.parameters(), "model is a generator"),
    (lambda m: None, "model is a NoneType"),
    (lambda m: m.w, "model is a Parameter"),
    (lambda m: Slope, "model is the class Slope"),
    (lambda m: m.forward, "model is a method"),
]


@pytest.mark.parametrize(("spoil", "message"), NO_MODELS, ids=[message for _, message in NO_MODELS])
@pytest.mark.parametrize("cls", [hvdlocal.LocalOptimizer, hvdlocal.SynchronousOptimizer])
def test_what_is_no_model(comm, cls, spoil, message):
    model = Slope()
    settings = {"period": hvdlocal.ConstantPeriod(2)} if cls is hvdlocal.LocalOptimizer else {}
    with pytest.raises(ValueError, match=message):
        cls(sgd(model), spoil(model), **settings)


SPARSE = [
    (local, {"accumulate": 2}, "accumulate=2"),
    (local, {"max_norm": 1.0}, "max_norm=1.0"),
    (local, {"scaling": hvdlocal.LocalAdaScale()}, "LocalAdaScale"),
    (synchronous, {}, "a SynchronousOptimizer"),
]


class Table(torch.nn.Module):
    """A layer that nobody knows, with sparse gradients."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(10, 3))

    def forward(self, x):
        return torch.nn.functional.embedding(x, self.weight, sparse=True)


@pytest.mark.parametrize(("make", "settings", "reason"), SPARSE, ids=[reason for *_, reason in SPARSE])
@pytest.mark.parametrize("layer", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_layers_with_sparse_gradients(comm, make, settings, reason, layer):
    """Refused before training where dense gradients are needed; frozen, or dense, they are not."""
    model = torch.nn.ModuleDict({"table": layer(10, 3, sparse=True), "slope": Slope()})
    with pytest.raises(
        ValueError, match=rf"'table' makes sparse gradients, but {reason} needs dense ones: use sparse=False"
    ):
        make(model, **settings)
    model["table"].requires_grad_(False)
    make(model, **settings)
    make(torch.nn.ModuleDict({"table": layer(10, 3), "slope": Slope()}), **settings)


@pytest.mark.parametrize("layer", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_sparse_layers_that_another_optimizer_trains(comm, layer):
    """SparseAdam for the table, hvdlocal for the rest; and an attribute `sparse` of another meaning."""
    model = torch.nn.ModuleDict({"table": layer(10, 3, sparse=True), "slope": Slope()})
    model["slope"].sparse = True
    rest = torch.optim.SGD(model["slope"].parameters(), lr=1.0)
    for settings in ({"accumulate": 2}, {"scaling": hvdlocal.LocalAdaScale()}):
        local(model, optimizer=rest, **settings)
    hvdlocal.SynchronousOptimizer(rest, model)


@pytest.mark.parametrize(("make", "settings", "reason"), SPARSE, ids=[reason for *_, reason in SPARSE])
def test_sparse_gradients_of_unknown_layers(comm, make, settings, reason):
    model = Table()
    optimizer = make(model, **settings)
    model(torch.tensor([1, 2])).sum().backward()
    if comm.size > 1 or "scaling" not in settings:  # a single rank takes no statistics
        with pytest.raises(ValueError, match="sparse=False"):
            optimizer.step()


def test_sparse_gradients_of_unknown_layers_with_islands(comm):
    model = Table()
    optimizer = local(model, 2, communicator=with_islands(comm, comm.size))
    model(torch.tensor([1, 2])).sum().backward()
    if comm.size > 1:
        with pytest.raises(ValueError, match=f"island={comm.size} needs dense ones: use sparse=False"):
            optimizer.step()


def test_sparse_gradients_where_they_can_be_used(comm):
    model = Table()
    optimizer = local(model, 2, optimizer=sgd(model))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.tensor([1 + comm.rank])).sum().backward()
        optimizer.step()
    rows = model.weight.detach()[:, 0]
    expected = [-2 / comm.size if 1 <= row <= comm.size else 0.0 for row in range(10)]
    torch.testing.assert_close(rows, torch.tensor(expected))


@BOTH
def test_the_state_of_another_optimizer(comm, make):
    model = Slope()
    optimizer = make(model, optimizer=sgd(model, momentum=0.9))
    step(optimizer, model, 1.0)
    state = optimizer.state_dict()
    for other in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
        model = Slope()
        target = make(model, optimizer=other(model.parameters(), lr=0.1))
        with pytest.raises(ValueError, match=rf"around SGD, and here it is around {other.__name__}"):
            target.load_state_dict(state)
        step(target, model, 1.0)  # nothing of it was taken
    del state["hvdlocal"]["optimizer"]  # as older states are
    optimizer.load_state_dict(state)


@BOTH
def test_the_state_of_another_model(comm, make):
    for kind, name in ((torch.optim.SGD, "momentum_buffer"), (torch.optim.Adam, "exp_avg")):
        settings = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        models = Slope(10), Slope(11)
        source, target = (make(one, optimizer=kind(one.parameters(), lr=0.1, **settings)) for one in models)
        step(source, models[0], 1.0)
        with pytest.raises(ValueError, match=rf"another model: its {name} of shape \(10,\) .* of shape \(11,\) here"):
            target.load_state_dict(source.state_dict())
        step(target, models[1], 1.0)  # nothing of it was taken


@BOTH
@pytest.mark.parametrize("loss", [None, "1.0", torch.ones(3), [1.0]], ids=["none", "string", "vector", "list"])
def test_a_loss_that_is_not_one_number(comm, make, loss):
    with pytest.raises(ValueError, match=r"record_loss\(.*\): give one number"):
        make(Slope()).record_loss(loss)


@BOTH
def test_losses_that_are_one_number(comm, make):
    model = Slope()
    optimizer = make(model)
    optimizer.record_loss(torch.tensor([1.0]))
    optimizer.record_loss(torch.tensor(2.0, dtype=torch.float64))
    optimizer.record_loss(3)
    model(1.0).backward()
    optimizer.step()
    assert optimizer.loss == 2.0


@pytest.mark.parametrize("make", [local, synchronous])
def test_horovods_optimizer_around_ours(comm, make):
    """It makes a class of its own with ours as its base."""
    optimizer = make(Slope())
    with pytest.raises(ValueError, match=r"hvd.DistributedOptimizer around a .*Optimizer .*delete that line"):
        type(type(optimizer).__name__, (type(optimizer),), {"__module__": "horovod.torch.optimizer"})
    if comm.backend == "horovod":
        import horovod.torch as hvd

        with pytest.raises(ValueError, match="delete that line"):
            hvd.DistributedOptimizer(optimizer)

    class Own(type(optimizer)):
        """A user's own subclass."""

    assert issubclass(Own, type(optimizer))
