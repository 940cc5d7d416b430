"""MeanGradient: sums of gradients in buckets that begin during the backward pass."""

import warnings

import pytest
import torch
from support.models import everywhere_equal, flat, sgd
from torch.utils.checkpoint import checkpoint

import hvdlocal

WIDTH = 8
ROW = 4 * WIDTH * WIDTH  # bytes of one layer's weight


class Layers(torch.nn.Module):
    """Layers of equal size; `used` says which take part, and `repeated` how often the first is applied."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)])

    def forward(self, x, without=()):
        for i, layer in enumerate(self.layers):
            if i not in without:
                x = torch.tanh(layer(x))
        return x.square().sum()


def synchronous(model, bucket_bytes=ROW, *, optimizer=None, **settings):
    optimizer = optimizer or sgd(model, lr=0.05, momentum=0.9)
    return hvdlocal.SynchronousOptimizer(optimizer, model, bucket_bytes=bucket_bytes, **settings)


def inputs(comm, i):
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * i + comm.rank))


class Spy:
    """Records which sums begin, and whether in the backward pass or in `step`."""

    def __init__(self, comm, monkeypatch):
        self.sums, self.phase = [], "step"
        start_sum_ = comm.start_sum_

        def recorded(tensor, name):
            self.sums.append((name.rpartition(".")[2], self.phase))
            return start_sum_(tensor, name)

        monkeypatch.setattr(comm, "start_sum_", recorded)

    def backward(self, loss, **arguments):
        self.phase = "backward"
        loss.backward(**arguments)
        self.phase = "step"

    def taken(self):
        sums, self.sums = self.sums, []
        return sums


@pytest.fixture
def spy(comm, monkeypatch):
    return Spy(comm, monkeypatch)


EARLY = [(str(i), "backward") for i in range(5)] + [("gradients", "step")]
AFTERWARDS = [(str(i), "step") for i in range(5)] + [("gradients", "step")]


def test_sums_begin_in_the_backward_pass_from_the_second_step_on(comm, spy):
    if comm.size == 1:
        pytest.skip("one rank sums nothing")
    model = Layers()
    optimizer = synchronous(model)
    spy.taken()
    for i in range(3):
        optimizer.zero_grad()
        spy.backward(model(inputs(comm, i)))
        optimizer.step()
        assert spy.taken() == (EARLY if i else AFTERWARDS)


def test_messages_are_as_many_and_as_large_as_the_buckets(comm):
    """Six layers of 256 bytes in buckets of 512: three, and the scalars."""
    model = Layers()
    optimizer = synchronous(model, 2 * ROW)
    for i in range(3):
        collectives, sent = comm.traffic.collectives, comm.traffic.bytes
        optimizer.zero_grad()
        model(inputs(comm, i)).backward()
        optimizer.step()
        if comm.size > 1:
            scalars = 4 * 48  # 3 flags, 7 scalars and 32 bits of the digest, up to a multiple of 64 bytes
            assert comm.traffic.collectives - collectives == 3
            assert comm.traffic.bytes - sent == 6 * ROW + scalars


# -- the same training whatever the buckets are --------------------------------------------------------------------------


def plain(model, optimizer, x):
    model(x).backward()


def two_losses(model, optimizer, x):
    """Two backward passes with parameters in common."""
    model(x).backward()
    model(x.flip(0) * 2, without=(0, 3)).backward()


def disjoint_losses(model, optimizer, x):
    """Two backward passes without parameters in common."""
    model(x, without=(3, 4, 5)).backward()
    model(x, without=(0, 1, 2)).backward()


def clipped(model, optimizer, x):
    model(x).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def clipped_past_autograd(model, optimizer, x):
    model(x).backward()
    for p in model.parameters():
        p.grad.data.mul_(0.5)


def scaled_in_inference_mode(model, optimizer, x):
    model(x).backward()
    with torch.inference_mode():
        for p in model.parameters():
            p.grad.mul_(0.5)


def replaced(model, optimizer, x):
    model(x).backward()
    for p in model.parameters():
        p.grad = p.grad * 2


def one_taken_away(model, optimizer, x):
    model(x).backward()
    model.layers[4].weight.grad = None


def assigned(model, optimizer, x):
    """Gradients that no backward pass has accumulated."""
    for p, grad in zip(model.parameters(), torch.autograd.grad(model(x), list(model.parameters())), strict=True):
        p.grad = grad


def abandoned(model, optimizer, x):
    """A backward pass without a step before the one that counts."""
    model(x * 3).backward()
    optimizer.zero_grad()
    model(x).backward()


def abandoned_kept(model, optimizer, x):
    model(x * 3).backward()
    optimizer.zero_grad(set_to_none=False)
    model(x).backward()


def failed(model, optimizer, x):
    """A backward pass that fails in its middle."""

    def fail(_):
        raise OSError("in the middle")

    h = model.layers[1](model.layers[0](x))
    h.register_hook(fail)
    for layer in model.layers[2:]:
        h = torch.tanh(layer(h))
    with pytest.raises(OSError, match="in the middle"):
        h.square().sum().backward()
    optimizer.zero_grad()
    model(x).backward()


def second_order(model, optimizer, x):
    """A gradient penalty, after a backward pass with create_graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x).backward(create_graph=True)
    sum(p.grad.square().sum() for p in model.parameters()).backward()


def kept_in_place(model, optimizer, x):
    optimizer.zero_grad(set_to_none=False)
    model(x).backward()


def unused_alike(model, optimizer, x):
    model(x, without=(2, 5)).backward()


def unused_in_turn(model, optimizer, x):
    """Layers that take part in one step and not in the next, other ones on every rank."""
    model(x, without=(optimizer.round % 6, (optimizer.round + optimizer.communicator.rank) % 6)).backward()


def unused_in_turn_kept(model, optimizer, x):
    optimizer.zero_grad(set_to_none=False)
    unused_in_turn(model, optimizer, x)


def without_any(model, optimizer, x):
    """No gradient on one rank in every other step."""
    if optimizer.round % 2 or optimizer.communicator.rank:
        model(x).backward()


def frozen_later(model, optimizer, x):
    if optimizer.round == 3:
        model.layers[3].weight.requires_grad_(False)
    model(x).backward()


def checkpointed(model, optimizer, x):
    checkpoint(model, x, use_reentrant=False).backward()


def checkpointed_reentrant(model, optimizer, x):
    """The inner backward passes come to one layer twice."""
    x = x.requires_grad_()
    for i in (3, 0, 1, 2, 4, 5, 3):
        x = torch.tanh(checkpoint(model.layers[i], x, use_reentrant=True))
    x.square().sum().backward()


def seen_by_a_hook(model, optimizer, x):
    """A user reads a gradient between backward and step, and writes into what the last step has left."""
    before = [p.grad for p in model.parameters()]
    optimizer.zero_grad()
    model(x).backward()
    assert all(p.grad is not one for p, one in zip(model.parameters(), before, strict=True))


LOOPS = [
    plain,
    two_losses,
    disjoint_losses,
    clipped,
    clipped_past_autograd,
    scaled_in_inference_mode,
    replaced,
    one_taken_away,
    assigned,
    abandoned,
    abandoned_kept,
    failed,
    second_order,
    kept_in_place,
    unused_alike,
    unused_in_turn,
    unused_in_turn_kept,
    without_any,
    frozen_later,
    checkpointed,
    checkpointed_reentrant,
    seen_by_a_hook,
]


def assert_same(comm, one, other):
    """Equal to the bit on two ranks; on more, an allreduce may add in another order when a message has another length."""
    if comm.size <= 2:
        assert torch.equal(one, other)
    else:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:gradients changed")
@pytest.mark.parametrize(
    "settings", [{}, {"accumulate": 3}, {"max_norm": 0.05}, {"scaling": hvdlocal.AdaScale()}], ids=str
)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_buckets_change_nothing(comm, loop, settings):
    models = [Layers(), Layers()]
    optimizers = [synchronous(model, size, **settings) for model, size in zip(models, (ROW, None), strict=True)]
    for i in range(8 * settings.get("accumulate", 1)):
        for model, optimizer in zip(models, optimizers, strict=True):
            if "kept" not in loop.__name__:
                optimizer.zero_grad()
            loop(model, optimizer, inputs(comm, i))
            optimizer.step()
        one, other = ([p.grad for p in model.parameters()] for model in models)
        assert all((a is None) == (b is None) for a, b in zip(one, other, strict=True))
    assert_same(comm, flat(models[0]), flat(models[1]))
    assert everywhere_equal(comm, flat(models[0]))
    assert optimizers[0].gain == pytest.approx(optimizers[1].gain, rel=1e-6)


@pytest.mark.parametrize("loop", [plain, disjoint_losses, kept_in_place, unused_alike, frozen_later, checkpointed])
def test_such_loops_go_on_overlapping(comm, spy, recwarn, loop):
    model = Layers()
    optimizer = synchronous(model)
    for i in range(8):
        spy.taken()
        if loop is not kept_in_place:
            optimizer.zero_grad()
        spy.phase = "backward"
        loop(model, optimizer, inputs(comm, i))
        spy.phase = "step"
        optimizer.step()
    if comm.size > 1:
        assert spy.taken() == EARLY
    assert not recwarn.list


@pytest.mark.parametrize("loop", [two_losses, clipped, replaced, abandoned, second_order, checkpointed_reentrant])
def test_gradients_that_change_end_the_overlap_with_a_warning_on_rank_0(comm, spy, loop):
    model = Layers()
    optimizer = synchronous(model)
    for i in range(5):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.zero_grad()
            spy.taken()
            spy.phase = "backward"
            loop(model, optimizer, inputs(comm, i))
            spy.phase = "step"
            optimizer.step()
        told = [str(one.message) for one in caught if "gradients changed" in str(one.message)]
        found_first = loop in (clipped, replaced)
        if comm.size > 1:
            assert len(told) == (comm.rank == 0 and i == (0 if found_first else 3)), (i, told)
            assert (len(spy.taken()) == 12) == (not found_first and 1 <= i <= 3), "only such steps repeat their sums"
