"""MeanGradient: sums of gradients in buckets that begin during the backward pass."""

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
from support.models import Slope, everywhere_equal, flat, mean, sgd, slopes
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


def replaced_in_inference_mode(model, optimizer, x):
    """Torch counts no changes of such tensors."""
    model(x).backward()
    with torch.inference_mode():
        for p in model.parameters():
            p.grad = p.grad * 2


def first_layer_changed(model, optimizer, x):
    """A change in the last bucket, which has not begun when `step` is called."""
    model(x).backward()
    if optimizer.round:
        model.layers[0].weight.grad.mul_(2)


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
    model(x, without=(-optimizer.round % 6, (optimizer.communicator.rank - optimizer.round) % 6)).backward()


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
    replaced_in_inference_mode,
    first_layer_changed,
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


@pytest.mark.parametrize(
    "loop", [plain, disjoint_losses, first_layer_changed, kept_in_place, unused_alike, frozen_later, checkpointed]
)
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


def test_layers_that_take_part_in_turn_are_late_once_each(comm, spy, recwarn):
    """A layer that has been late is waited for from then on, so its steps' sums are not repeated again."""
    model = Layers()
    optimizer = synchronous(model)
    repeated = 0
    for i in range(24):
        optimizer.zero_grad()
        spy.taken()
        unused_in_turn(model, optimizer, inputs(comm, i))
        optimizer.step()
        repeated += len(spy.taken()) > 6
    assert not recwarn.list
    if comm.size > 1:
        assert optimizer._accumulated.overlaps
        assert 4 <= repeated <= len(model.layers) * comm.size


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


# -- by other values than a second run -------------------------------------------------------------------------------------


def test_second_backward_passes_count_on_one_rank_only(comm):
    """Gradients 1 and, on rank 0 only, 1 + 3, which begins when sums overlap already: w = 5 − 1 − … − (1 + 3/K) …"""
    model = torch.nn.ModuleList([Slope(64) for _ in range(3)])
    optimizer = synchronous(model, 256, optimizer=sgd(model))
    for i in range(6):
        optimizer.zero_grad()
        sum(one(1.0) for one in model).backward()
        if comm.rank == 0 and i in (2, 4):
            sum(one(3.0) for one in model).backward()
        optimizer.step()
    torch.testing.assert_close(flat(model), torch.full((192,), 5 - 6 - 2 * 3 / comm.size))


def test_a_gradient_that_comes_late_counts(comm, spy):
    """The last model takes part from the third step on, on rank 0 only; from the fourth step on its gradient is waited for."""
    model = torch.nn.ModuleList([Slope(64) for _ in range(3)])
    optimizer = synchronous(model, 256, optimizer=sgd(model))
    for i in range(5):
        optimizer.zero_grad()
        spy.taken()
        # The graph is run from its end: what is added first comes last.
        terms = [model[2](1.0)] if comm.rank == 0 and i >= 2 else []
        sum([*terms, model[0](1.0), model[1](1.0)]).backward()
        optimizer.step()
        if comm.size > 1:
            assert len(spy.taken()) == (6 if i == 2 else 3)
    expected = [5 - 5.0] * 128 + [5 - 3 / comm.size] * 64
    torch.testing.assert_close(flat(model), torch.tensor(expected))


def test_a_late_layer_that_is_frozen_is_no_longer_waited_for(comm, spy):
    """Layer 1 takes part in the third step only, in which its bucket has not waited for it."""
    model = Layers()
    optimizer = synchronous(model)
    for i in range(5):
        if i == 3:
            model.layers[1].requires_grad_(False)
        optimizer.zero_grad()
        spy.taken()
        spy.backward(model(inputs(comm, i), without=() if i >= 2 else (1,)))
        optimizer.step()
    if comm.size > 1:
        assert spy.taken() == EARLY


@pytest.mark.parametrize("bucket_bytes", [256, None])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_layer_that_is_frozen_later_stays_where_it_is(comm, bucket_bytes, accumulate):
    """It would go on moving by its momentum if its gradient counted as zero."""
    model = torch.nn.ModuleList([Slope(64) for _ in range(3)])
    optimizer = synchronous(model, bucket_bytes, optimizer=sgd(model, momentum=0.5), accumulate=accumulate)
    for i in range(4 * accumulate):
        model[1].requires_grad_(not accumulate <= i < 3 * accumulate)
        optimizer.zero_grad()
        sum(one(1.0) for one in model).backward()
        optimizer.step()
    moved = 1 + 1.5 + 1.75 + 1.875
    expected = [5 - moved] * 64 + [5 - 1 - 1.5] * 64 + [5 - moved] * 64
    torch.testing.assert_close(flat(model), torch.tensor(expected))


def test_a_layer_that_is_frozen_between_backward_and_step_takes_the_step(comm):
    """As in an adversarial pair, whose other model is frozen while the first computes its gradients."""
    model = torch.nn.ModuleList([Slope(64) for _ in range(3)])
    optimizer = synchronous(model, 256, optimizer=sgd(model))
    for _ in range(3):
        optimizer.zero_grad()
        sum(one(1.0) for one in model).backward()
        model.requires_grad_(False)
        optimizer.step()
        model.requires_grad_(True)
    torch.testing.assert_close(flat(model), torch.full((192,), 2.0))


def test_synchronize_forgets_a_backward_pass_before_the_first_step(comm, spy, recwarn):
    model = Layers()
    optimizer = synchronous(model)
    model(inputs(comm, 0)).backward()
    optimizer.zero_grad()
    optimizer.synchronize()
    for i in range(2):
        optimizer.zero_grad()
        spy.taken()
        spy.backward(model(inputs(comm, i), without=(0,)))
        optimizer.step()
    assert not recwarn.list
    if comm.size > 1:
        assert spy.taken() == EARLY


def test_a_user_may_read_a_gradient_between_backward_and_step(comm):
    model = torch.nn.ModuleList([Slope(64) for _ in range(3)])
    optimizer = synchronous(model, 256, optimizer=sgd(model))
    c = slopes(comm)
    for set_to_none in (True, True, False, False):
        optimizer.zero_grad(set_to_none=set_to_none)
        sum(one(c[comm.rank]) for one in model).backward()
        comm.barrier("test.sums_are_there")
        for one in model:
            torch.testing.assert_close(one.w.grad, torch.full((64,), c[comm.rank]), msg="this rank's own")
        optimizer.step()
        for one in model:
            torch.testing.assert_close(one.w.grad, torch.full((64,), mean(c)), msg="the mean")


def test_the_last_micro_batch_is_summed_while_it_is_computed(comm, spy):
    c = slopes(comm)
    model = torch.nn.ModuleList([Slope(64) for _ in range(3)])
    optimizer = synchronous(model, 256, optimizer=sgd(model), accumulate=2)
    for i in range(3):
        for factor in (1, 2):
            spy.taken()
            optimizer.zero_grad()
            spy.backward(sum(one(factor * c[comm.rank]) for one in model))
            optimizer.step()
            early = [("0", "backward"), ("1", "backward"), ("gradients", "step")]
            if comm.size > 1 and i > 0:
                assert spy.taken() == (early if factor == 2 else [])
    torch.testing.assert_close(flat(model), torch.full((192,), 5 - 3 * 1.5 * mean(c)))


def test_a_grad_scaler_ends_the_overlap_without_a_warning(comm, spy, recwarn):
    """An overflow on rank 0 in the first step skips it everywhere, and the next scale differs between the ranks."""
    model = torch.nn.ModuleList([Slope(64) for _ in range(3)])
    optimizer = synchronous(model, 256, optimizer=sgd(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    for i in range(4):
        optimizer.zero_grad()
        c = float("inf") if comm.rank == 0 and i == 1 else 1.0
        spy.taken()
        spy.backward(scaler.scale(sum(one(c) for one in model)))
        if i == 3:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if comm.size > 1:
            assert spy.taken() == [("0", "step"), ("1", "step"), ("gradients", "step")]
    torch.testing.assert_close(flat(model), torch.full((192,), 5.0 - 3))
    assert not recwarn.list


def test_a_grad_scaler_may_come_later(comm):
    """Scales that differ between the ranks from the first scaled step on."""
    model = torch.nn.ModuleList([Slope(64) for _ in range(3)])
    optimizer = synchronous(model, 256, optimizer=sgd(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (3 + comm.rank))
    for i in range(5):
        optimizer.zero_grad()
        loss = sum(one(1.0) for one in model)
        if i < 2:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(flat(model), torch.full((192,), 5.0 - 5))


def test_a_sum_under_way_ends_in_synchronize(comm, spy):
    """After a backward pass without a step, on every rank or on some; the next step is right, and overlaps again after it."""
    model = Layers()
    optimizer = synchronous(model)
    reference = Layers()
    serial = synchronous(reference, None)
    for i in range(7):
        if i in (3, 4):
            optimizer.zero_grad()
            if i == 4 or comm.rank == 0:
                model(3 * inputs(comm, i)).backward()
            optimizer.synchronize()
        for one, its in ((optimizer, model), (serial, reference)):
            one.zero_grad()
            spy.taken()
            spy.backward(its(inputs(comm, i)))
            one.step()
            if comm.size > 1 and one is optimizer and i > 0:
                assert spy.taken() == EARLY
    assert_same(comm, flat(model), flat(reference))


def test_a_rank_in_a_step_meets_one_in_synchronize(comm):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    model = Layers()
    optimizer = synchronous(model)
    for i in range(3):
        optimizer.zero_grad()
        model(inputs(comm, i)).backward()
        if i < 2:
            optimizer.step()
    meet = optimizer.step if comm.rank == 0 else optimizer.synchronize
    with pytest.raises(hvdlocal.CommunicationError, match=r"hvdlocal\.gradients"):
        meet()


def test_an_error_of_a_sum_comes_out_of_the_backward_pass(comm, monkeypatch):
    model = Layers()
    optimizer = synchronous(model)
    for i in range(2):
        optimizer.zero_grad()
        model(inputs(comm, i)).backward()
        optimizer.step()

    def refuse(tensor, name):
        raise hvdlocal.CommunicationError("one clear sentence")

    with monkeypatch.context() as patched:
        patched.setattr(comm, "start_sum_", refuse)
        optimizer.zero_grad()
        loss = model(inputs(comm, 2))
        if comm.size > 1:
            with pytest.raises(hvdlocal.CommunicationError, match=r"^one clear sentence$"):
                loss.backward()


def test_two_optimizers_whose_backward_passes_meet(comm):
    """As in an adversarial pair: the loss of one model has gradients for both."""
    models = [Layers(), Layers()]
    references = [Layers(), Layers()]
    for pair, size in ((models, ROW), (references, None)):
        optimizers = [synchronous(model, size) for model in pair]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for i in range(6):
                x = inputs(comm, i)
                optimizers[0].zero_grad()
                (pair[0](x) * pair[1](x)).backward()
                optimizers[0].step()
                optimizers[1].zero_grad()
                (pair[1](x) - pair[0](x).detach()).backward()
                optimizers[1].step()
    for model, reference in zip(models, references, strict=True):
        assert_same(comm, flat(model), flat(reference))


def test_two_optimizers_with_the_halves_of_a_model(comm, spy):
    model = Layers()
    reference = Layers()
    serial = synchronous(reference, None)
    halves = [torch.nn.ModuleList(model.layers[:3]), torch.nn.ModuleList(model.layers[3:])]
    optimizers = [synchronous(half) for half in halves]
    for i in range(4):
        for half in optimizers:
            half.zero_grad()
        spy.taken()
        spy.backward(model(inputs(comm, i)))
        for half in optimizers:
            half.step()
        if comm.size > 1:
            assert [phase for _, phase in spy.taken()].count("backward") == (4 if i else 0)
        serial.zero_grad()
        reference(inputs(comm, i)).backward()
        serial.step()
    assert_same(comm, flat(model), flat(reference))


class Tied(Layers):
    def __init__(self):
        super().__init__()
        self.layers[5].weight = self.layers[1].weight


class Images(torch.nn.Module):
    """Convolutions whose weights lie in memory channels last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)]
        self.layers = torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.layers(x.view(1, 4, 2, 4)).square().sum()


class Odd(torch.nn.Module):
    """Parameters of no and of one element, and one that is larger than a bucket."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.none = torch.nn.Parameter(torch.empty(0, 3))
        self.one = torch.nn.Parameter(torch.tensor(1.0))
        self.large = torch.nn.Parameter(0.1 * torch.randn(WIDTH, 5 * WIDTH))
        self.last = torch.nn.Linear(5 * WIDTH, 1)

    def forward(self, x):
        return self.last(x @ self.large * self.one).square().sum() + self.none.sum()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("make", [Layers, Tied, Images, Odd])
def test_other_models(comm, spy, recwarn, make, compiled):
    model, reference = make(), make()
    pairs = [(model, synchronous(model)), (reference, synchronous(reference, None))]
    forwards = [torch.compile(one, backend="aot_eager") if compiled else one for one in (model, reference)]
    for i in range(5):
        for (_, optimizer), forward in zip(pairs, forwards, strict=True):
            optimizer.zero_grad()
            loss = forward(inputs(comm, i))
            spy.taken()
            spy.backward(loss)
            early = spy.taken()
            optimizer.step()
            if comm.size > 1:
                assert bool(early) == (optimizer is pairs[0][1] and i > 0)
    assert_same(comm, flat(model), flat(reference))
    assert not [one for one in recwarn.list if "gradients" in str(one.message)]


# -- what hooks must not do ------------------------------------------------------------------------------------------------


def test_copies_of_the_model_have_no_hooks(comm, spy):
    model = Layers()
    optimizer = synchronous(model)
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for i in range(2):
        optimizer.zero_grad()
        model(inputs(comm, i)).backward()
        optimizer.step()
    spy.taken()
    for other in (copied, loaded):
        spy.backward(other(inputs(comm, 0)))
    assert not spy.taken()


def test_hooks_end_with_their_optimizer(comm, spy):
    model = Layers()
    optimizer = synchronous(model)
    for i in range(2):
        optimizer.zero_grad()
        model(inputs(comm, i)).backward()
        optimizer.step()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    spy.taken()
    spy.backward(model(inputs(comm, 0)))
    assert not spy.taken()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("bucket_bytes", [0, -1, 2.5, "25 MB"])
def test_sizes_that_are_none_are_refused(comm, bucket_bytes):
    with pytest.raises(ValueError, match=r"bucket_bytes=.*positive number of bytes, or None"):
        synchronous(Layers(), bucket_bytes)


# -- state -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(None, ROW), (ROW, None), (ROW, ROW)], ids=str)
def test_a_state_within_an_accumulation_goes_on_with_other_buckets(comm, before, after):
    """What was collected is saved in the model's order, as before there were buckets."""
    model = Layers()
    optimizer = synchronous(model, before, accumulate=3)
    reference = Layers()
    serial = synchronous(reference, None, accumulate=3)
    for i in range(8):
        if i == 5:
            state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model = Layers()
            optimizer = synchronous(model, after, accumulate=3)
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            assert optimizer.micro_batches == 2
        for one, its in ((optimizer, model), (serial, reference)):
            one.zero_grad()
            its(inputs(comm, i)).backward()
            one.step()
    assert optimizer.micro_batches == 2
    assert_same(comm, flat(model), flat(reference))


def test_a_state_that_is_loaded_during_sums(comm):
    model = Layers()
    optimizer = synchronous(model)
    reference = Layers()
    serial = synchronous(reference, None)
    for i in range(5):
        if i == 3:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            optimizer.zero_grad()
            model(inputs(comm, 99)).backward()
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        for one, its in ((optimizer, model), (serial, reference)):
            one.zero_grad()
            its(inputs(comm, i)).backward()
            one.step()
    assert_same(comm, flat(model), flat(reference))


@pytest.mark.parametrize("bucket_bytes", [256, None])
def test_a_state_holds_that_a_micro_batch_had_no_gradient(comm, bucket_bytes):
    def make():
        model = torch.nn.ModuleList([Slope(64) for _ in range(3)])
        return model, synchronous(
            model, bucket_bytes, optimizer=sgd(model, lr=1e-3), accumulate=2, scaling=hvdlocal.AdaScale()
        )

    model, optimizer = make()
    if comm.rank:
        sum(one(1.0) for one in model).backward()
    optimizer.step()
    state = optimizer.state_dict()
    model, optimizer = make()
    optimizer.load_state_dict(state)
    for steps in range(2):
        for _ in range(1 + steps):
            optimizer.zero_grad()
            sum(one(1.0) for one in model).backward()
            optimizer.step()
        assert (optimizer.grad_sqr is None) == (steps == 0)
