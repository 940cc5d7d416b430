"""The outer optimizer steps on Δ = φ − x̄: closed forms, equality over the ranks, memory, state."""

import copy
import math

import pytest
import torch
from support.islands import with_islands
from support.models import Slope, everywhere_equal, local, sgd, step

import hvdlocal
from hvdlocal.averaging.outer import default_slowmo_momentum


def slope_of(comm) -> float:
    """A different gradient on every rank, 1 and 3 on two; their mean is 2."""
    return 2 * (1 + 2 * comm.rank) / comm.size


def after_rounds(comm, periods, rates=None, **settings):
    """φ after each of the rounds with these periods, from 0, at learning rate 1 or at `rates` of the rounds."""
    model = Slope(start=0.0)
    optimizer = local(model, Given(periods), **settings)
    found = []
    for number, period in enumerate(periods):
        for _ in range(period):
            optimizer.param_groups[0]["lr"] = rates[number] if rates else 1.0
            step(optimizer, model, slope_of(comm))
        assert optimizer.in_sync
        assert everywhere_equal(comm, model.w.detach())
        found.append(model.w.tolist()[0])
    return found


class Given(hvdlocal.ConstantPeriod):
    """The periods of a list, one after the other."""

    def __init__(self, periods):
        super().__init__(periods[0])
        object.__setattr__(self, "left", list(periods))

    def _period(self, start):
        return self.left.pop(0)


def momentum(lr, beta, **settings):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=beta, **settings)


@pytest.mark.parametrize(
    ("periods", "settings", "expected"),
    [
        # Every round of two steps moves the mean by Δ = 2 · 2 = 4.
        ((2, 2), {}, (-4, -8)),
        # m = 4, φ = −0.7 (4 + 0.9 · 4) = −5.32; m = 0.9 · 4 + 4 = 7.6, φ = −5.32 − 0.7 (4 + 0.9 · 7.6) = −12.908
        ((2, 2), {"outer": hvdlocal.nesterov(0.7, 0.9)}, (-5.32, -12.908)),
        ((2, 2), {"outer": momentum(0.7, 0.9, nesterov=True)}, (-5.32, -12.908)),
        # u = 4, φ = −4; u = 0.5 · 4 + 4 = 6, φ = −4 − 6 = −10
        ((2, 2), {"outer": hvdlocal.slowmo(0.5)}, (-4, -10)),
        ((2, 2), {"outer": momentum(1.0, 0.5)}, (-4, -10)),
        # S = 2: u = 4/2 = 2, φ = −0.7 · 2 (2 + 1.8) = −5.32; S = 4, Δ = 8: u = 1.8 + 2 = 3.8, φ −= 0.7 · 4 (2 + 3.42) = 15.176
        ((2, 4), {"outer": hvdlocal.nesterov(0.7, 0.9), "normalize_outer": True}, (-5.32, -20.496)),
        # m = 0.9 · 4 + 8 = 11.6, φ = −5.32 − 0.7 (8 + 0.9 · 11.6) = −18.228
        ((2, 4), {"outer": hvdlocal.nesterov(0.7, 0.9)}, (-5.32, -18.228)),
        # Without momentum: φ −= γ Δ, normalised or not.
        ((2, 4), {"outer": momentum(0.5, 0.0), "normalize_outer": True}, (-2, -6)),
        ((3,), {"outer": lambda p: torch.optim.Adam(p, lr=0.25)}, (-0.25,)),
    ],
)
def test_the_mean_is_a_gradient_of_the_outer_optimizer(comm, periods, settings, expected):
    assert after_rounds(comm, periods, **settings) == pytest.approx(expected, rel=1e-5)


def test_a_changed_learning_rate_changes_the_path(comm):
    """Rates 1 and 0.5, H = 2: Δ = 4, 2, S = 2, 1; u = 2, 0.5 · 2 + 2 = 3; φ = −2 · 2 = −4, −4 − 1 · 3 = −7."""
    assert after_rounds(comm, (2, 2), (1.0, 0.5), outer=hvdlocal.slowmo(0.5)) == pytest.approx([-4, -7])
    # Not normalised: u = 4, 0.5 · 4 + 2 = 4; φ = −4, −8.
    rates = after_rounds(comm, (2, 2), (1.0, 0.5), outer=hvdlocal.slowmo(0.5), normalize_outer=False)
    assert rates == pytest.approx([-4, -8])


def test_a_round_at_rate_zero_leaves_the_momentum_alone(comm):
    """Δ/S would be 0/0. u = 2; then nothing; then 0.5 · 2 + 2 = 3: φ = −4, −4, −10."""
    found = after_rounds(comm, (2, 2, 2), (1.0, 0.0, 1.0), outer=hvdlocal.slowmo(0.5))
    assert found == pytest.approx([-4, -4, -10])


def test_an_overflow_on_one_rank_leaves_the_path_the_same_on_all(comm):
    """K steps of 2 · (1 + 2k)/K on average 2; rank 0 skips its first, −2/K, so Δ₁ = 4 − 2/K², at S = 2 on every rank."""
    model = Slope(start=0.0)
    optimizer = local(model, 2, outer=hvdlocal.slowmo(0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(4):
        optimizer.zero_grad()
        scaler.scale(model(slope_of(comm))).backward()
        if number == comm.rank == 0:
            model.w.grad.fill_(math.inf)
        scaler.step(optimizer)
        scaler.update()
        assert number % 2 == 0 or everywhere_equal(comm, model.w.detach())
    first = 4 - 2 / comm.size**2
    assert model.w.tolist() == pytest.approx([-first - (0.5 * first + 4)] * 10)


@pytest.mark.parametrize("outer", [hvdlocal.nesterov(1.0, 0.0), hvdlocal.slowmo(0.0), momentum(1, 0)])
@pytest.mark.parametrize("normalize", [None, True])
def test_rate_one_without_momentum_is_plain_averaging_and_takes_no_memory(comm, outer, normalize):
    torch.manual_seed(comm.rank)
    gradients = torch.randn(7, 1000)

    def train(**settings):
        model = Slope(1000, start=0.1)
        optimizer = local(model, 3, optimizer=sgd(model, lr=0.1, momentum=0.9), **settings)
        for gradient in gradients:
            optimizer.zero_grad()
            (model.w * gradient).sum().backward()
            optimizer.step()
        optimizer.synchronize()
        return model, optimizer

    plain, _ = train()
    same, optimizer = train(outer=outer, normalize_outer=normalize)
    assert torch.equal(same.w, plain.w)
    assert optimizer.shared_state() == {}
    assert optimizer._outer._phi.data_ptr() == same.w.data_ptr(), "the memory of φ is that of the model"


def test_an_outer_rate_that_is_changed_later_counts(comm):
    """The loop holds the outer optimizer: −4 by plain averaging, then γ = 0.5: −4 − 0.5 · 4 = −6."""
    held = []

    def build(parameters):
        held.append(torch.optim.SGD(parameters, lr=1.0))
        return held[0]

    model = Slope(start=0.0)
    optimizer = local(model, 2, outer=build)
    for _ in range(2):
        step(optimizer, model, slope_of(comm))
    held[0].param_groups[0]["lr"] = 0.5
    for _ in range(2):
        step(optimizer, model, slope_of(comm))
    assert model.w.tolist() == pytest.approx([-6.0] * 10)


def test_a_round_begins_where_the_loop_has_put_the_model(comm):
    """0 goes to −4, and half of the way is −2; from 10 it goes to 6, and half of the way is 8."""
    model = Slope(start=0.0)
    optimizer = local(model, 2, outer=momentum(0.5, 0.0))
    for start, end in ((0.0, -2.0), (10.0, 8.0)):
        with torch.no_grad():
            model.w.fill_(start)
        for _ in range(2):
            step(optimizer, model, slope_of(comm))
        assert model.w.tolist() == pytest.approx([end] * 10)


def test_rounding_errors_of_the_loop_do_not_part_the_ranks(comm):
    """A loop that moves the weights and moves them back leaves other rounding errors on every rank."""
    model = Slope(1000, start=0.3)
    optimizer = local(model, 2, outer=hvdlocal.nesterov(0.7, 0.9))
    for number in range(6):
        with torch.no_grad():
            away = torch.full_like(model.w, 0.1 + 0.01 * comm.rank)
            model.w.add_(away).sub_(away)
        step(optimizer, model, slope_of(comm) / 1000)
        if number % 2:
            assert everywhere_equal(comm, model.w.detach())


def test_synchronize_ends_the_round_with_an_outer_step(comm):
    """One step of two: Δ = 2, m = 2, φ = −0.7 (2 + 1.8) = −2.66."""
    model = Slope(start=0.0)
    optimizer = local(model, 2, outer=hvdlocal.nesterov(0.7, 0.9))
    step(optimizer, model, slope_of(comm))
    optimizer.synchronize()
    assert model.w.tolist() == pytest.approx([-2.66] * 10)
    assert everywhere_equal(comm, model.w.detach())


@pytest.mark.parametrize("steps", [2, 3], ids=["between two rounds", "inside a round"])
@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("outer", [hvdlocal.nesterov(0.7, 0.9), hvdlocal.slowmo(0.5)])
def test_a_state_continues_a_run(comm, steps, in_parts, outer):
    def make():
        model = Slope(start=0.0)
        return model, local(model, 2, outer=outer)

    whole, before = make()
    for _ in range(steps):
        step(before, whole, slope_of(comm))
    model, after = make()
    model.load_state_dict(whole.state_dict())
    state = before.state_dict()
    if in_parts:
        after.load_shared_state([state["hvdlocal"].pop("shared")])
    after.load_state_dict(state)
    for _ in range(6 - steps):
        step(before, whole, slope_of(comm))
        step(after, model, slope_of(comm))
    assert torch.equal(model.w, whole.w)
    third = -5.32 - 7.588 - 0.7 * (4 + 0.9 * (0.9 * 7.6 + 4)) if outer.nesterov else -4 - 6 - 7
    assert model.w.tolist() == pytest.approx([third] * 10)


@pytest.mark.parametrize("build", [hvdlocal.nesterov(0.7, 0.9), torch.optim.Adam, torch.optim.Adagrad])
def test_a_run_can_go_back_to_where_it_began(comm, build):
    model = Slope(start=0.0)
    optimizer = local(model, 2, outer=build)
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    ends = []
    for _ in range(2):
        model.load_state_dict(start[0])
        optimizer.load_state_dict(copy.deepcopy(start[1]))
        for _ in range(4):
            step(optimizer, model, slope_of(comm))
        ends.append(model.w.tolist())
    assert ends[0] == ends[1]


def test_averaged_replicas_of_a_later_round_have_the_path_of_that_round(comm):
    """The round: u = 2, φ = −4. Half of a round: Δ = 2, S = 1, u = 0.5 · 2 + 2 = 3, φ = −7."""
    model = Slope(start=0.0)
    optimizer = local(model, 2, outer=hvdlocal.slowmo(0.5))
    for _ in range(3):
        step(optimizer, model, slope_of(comm))
    state = optimizer.state_dict()
    model.w.data.fill_(-6.0)
    optimizer.load_averaged_state_dict(state, progress=3.0)
    assert model.w.tolist() == pytest.approx([-7.0] * 10)


def test_averaged_replicas_of_a_checkpoint_are_applied_like_a_mean(comm):
    """As on another number of ranks: the model that was loaded is the mean of a round that was under way."""
    model = Slope(start=0.0)
    optimizer = local(model, 2, outer=hvdlocal.nesterov(0.7, 0.9))
    step(optimizer, model, slope_of(comm))
    state = optimizer.state_dict()
    model.w.data.fill_(-2.0)
    optimizer.load_averaged_state_dict(state, progress=1.0)
    assert model.w.tolist() == pytest.approx([-2.66] * 10)  # 0.7 · 1.9 · 2
    assert optimizer.in_sync


def test_a_state_with_an_outer_optimizer_is_refused_without_one(comm):
    model = Slope(start=0.0)
    optimizer = local(model, 2, outer=hvdlocal.nesterov())
    step(optimizer, model, slope_of(comm))
    other = Slope(start=0.0)
    with pytest.raises(ValueError, match="give it the outer optimizer of the run that saved it"):
        local(other, 2).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("build", "end"),
    [
        (hvdlocal.slowmo(0.5), -10.0),  # φ = −4, u = 0.5 · 2 + 2 = 3, at S = 2
        (
            lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.5),
            -8.8,
        ),  # β = 0.2 comes with the state: u = 0.2 · 2 + 2 = 2.4
    ],
)
def test_a_rule_is_what_it_was_built_with(comm, build, end):
    model = Slope(start=0.0)
    before = local(model, 2, outer=hvdlocal.slowmo(0.2))
    for _ in range(2):
        step(before, model, slope_of(comm))
    other = Slope(start=-4.0)
    after = local(other, 2, outer=build, normalize_outer=True)
    after.load_shared_state([before.shared_state()])
    for _ in range(2):
        step(after, other, slope_of(comm))
    assert other.w.tolist() == pytest.approx([end] * 10)


def test_the_state_of_another_outer_optimizer_is_refused(comm):
    model = Slope(start=0.0)
    state = local(model, 2, outer=torch.optim.Adam).state_dict()
    with pytest.raises(ValueError, match="is that of Adam as the outer optimizer, and here it is SGD"):
        local(Slope(start=0.0), 2, outer=hvdlocal.nesterov()).load_state_dict(state)


def test_a_rank_that_is_not_finite_is_left_out_of_the_mean(comm):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    model = Slope(start=0.0)
    optimizer = local(model, 2, outer=momentum(0.5, 0.0))
    step(optimizer, model, slope_of(comm))
    with pytest.raises(hvdlocal.NonFiniteError, match=r"on rank 1 of"):
        step(optimizer, model, float("nan") if comm.rank == 1 else 1.0)
    others = [2 * (1 + 2 * rank) / comm.size + 1.0 for rank in range(comm.size) if rank != 1]
    assert model.w.tolist() == pytest.approx([-0.5 * sum(others) / len(others)] * 10)
    assert everywhere_equal(comm, model.w.detach())


@pytest.mark.parametrize("outer", [hvdlocal.nesterov(0.7, 0.9), hvdlocal.slowmo(0.5), lambda p: torch.optim.Adam(p)])
def test_islands_hold_slices(comm, outer):
    """2 × 2 ranks: the same result as of two workers with the islands' mean gradients; each rank holds half of φ."""
    if comm.size != 4:
        pytest.skip("needs four ranks")
    torch.manual_seed(0)
    gradients = torch.randn(6, 4, 1001)  # of the ranks

    def train(communicator, gradient_of, **settings):
        model = Slope(1001, start=0.5)
        optimizer = local(model, 2, communicator=communicator, outer=outer, **settings)
        for now in gradients:
            optimizer.zero_grad()
            (model.w * gradient_of(now)).sum().backward()
            optimizer.step()
        return model, optimizer

    islands, optimizer = train(with_islands(comm, 2), lambda now: now[comm.rank])
    plain, whole = train(comm, lambda now: now.view(2, 2, -1).mean(1)[comm.rank // 2])  # K = 4, each mean twice
    assert torch.allclose(islands.w, plain.w, atol=1e-5)
    assert everywhere_equal(comm, islands.w.detach())
    assert optimizer.shared_state()["phi"].numel() == 512  # half of 1,008, in multiples of 64 bytes
    assert whole.shared_state()["phi"].numel() == 1008

    # The parts of an island's ranks are the whole state of ranks without islands, and the other way round.
    parts = comm.gather(optimizer.shared_state(), "test.parts")[:2]
    other = local(Slope(1001), 2, communicator=comm, outer=outer)
    other.load_shared_state(parts)
    assert torch.equal(other.shared_state()["phi"][:1001], islands.w.detach())
    for parts in ([other.shared_state()], [optimizer.shared_state()]):
        divided = local(Slope(1001), 2, communicator=with_islands(comm, 2), outer=outer)
        divided.load_shared_state(parts)
        for one, two in zip(
            torch.utils._pytree.tree_leaves(divided.shared_state()),
            torch.utils._pytree.tree_leaves(optimizer.shared_state()),
            strict=True,
        ):
            assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two

    # A plain state holds this rank's slice, which another rank of the island cannot use.
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    neighbour = comm.gather(state, "test.states")[comm.rank ^ 1]
    with pytest.raises(ValueError, match="needs another one: load each rank's own"):
        optimizer.load_state_dict(neighbour)


class WithoutRate(torch.optim.Optimizer):
    """Makes the mean the next φ."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad)


class NeedsClosure(torch.optim.SGD):
    """Its signature does not show that it evaluates the loss."""

    def step(self, closure=None):
        if closure is None:
            raise RuntimeError("a closure is required.")


class OnlyMatrices(torch.optim.SGD):
    def __init__(self, parameters):
        raise ValueError("only matrices")


class OwnMomentum(torch.optim.Optimizer):
    """Keeps its momentum in an attribute, not in `state`."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1.0})
        self.momentum = [torch.zeros_like(p) for p in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for p, moment in zip(self.param_groups[0]["params"], self.momentum, strict=True):
            p.sub_(moment.mul_(0.5).add_(p.grad))


def test_the_step_that_is_tried_leaves_no_trace(comm):
    """As slowmo(0.5): −4, −10; one step for each of the two rounds, also for a scheduler that wraps `step`."""
    built = []

    def build(parameters):
        built.append(OwnMomentum(parameters))
        built.append(torch.optim.lr_scheduler.ConstantLR(built[0], factor=1.0))
        return built[0]

    assert after_rounds(comm, (2, 2), outer=build) == pytest.approx([-4, -10])
    assert built[0].steps == 2


@pytest.mark.parametrize(
    "name", ["Adadelta", "Adafactor", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"]
)
def test_torchs_optimizers_that_can_step_are_taken(comm, name):
    build = getattr(torch.optim, name)
    plain = torch.nn.Parameter(torch.zeros(10, dtype=torch.float32, device="cpu"))
    plain.grad = torch.full_like(plain, 4.0)  # Δ of a round of two steps
    build([plain]).step()
    assert after_rounds(comm, (2,), outer=build) == pytest.approx([plain.tolist()[0]])


def test_an_optimizer_for_cuda_graphs_is_refused_on_a_cpu(comm):
    def build(parameters):
        return torch.optim.Adam(parameters, capturable=True)

    if Slope().w.is_cuda:
        local(Slope(), 2, outer=build)
        return
    with pytest.raises(ValueError, match=r"outer: Adam cannot step .*: build it without capturable"):
        local(Slope(), 2, outer=build)


def test_an_optimizer_without_a_learning_rate(comm):
    assert after_rounds(comm, (2, 2), outer=WithoutRate) == pytest.approx([-4, -8])


def test_a_rate_that_is_a_tensor_is_compared_as_a_number(comm):
    """It has a device, which differs between the ranks of a node."""
    optimizer = local(Slope(), 2, outer=lambda p: torch.optim.SGD(p, lr=torch.tensor(0.5)))
    assert "lr': 0.5" in optimizer.settings["outer"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"outer": hvdlocal.nesterov},
            r"give a function that builds the outer optimizer, such as hvdlocal.nesterov\(\)",
        ),
        ({"outer": WithoutRate, "normalize_outer": True}, "WithoutRate has no 'lr' in its parameter groups"),
        ({"outer": "nesterov"}, "outer='nesterov': give a function that builds the outer optimizer"),
        ({"outer": lambda p: None}, "outer: the function returned None; it must return a torch.optim.Optimizer"),
        (
            {"outer": lambda p: torch.optim.SGD([torch.zeros(2)], lr=1)},
            "of other parameters than the one that it was given",
        ),
        ({"outer": torch.optim.LBFGS}, r"outer: LBFGS cannot step a flat .* 'closure'\): give another optimizer"),
        ({"outer": NeedsClosure}, r"NeedsClosure cannot step .* \(a closure is required\): give another optimizer"),
        ({"outer": torch.optim.SparseAdam}, r"SparseAdam cannot step .* dense gradients.*\): give another optimizer"),
        ({"outer": momentum(0.5, 0.9, differentiable=True)}, "SGD cannot step .*: build it without differentiable"),
        ({"outer": OnlyMatrices}, r"the function fails for a flat .* \(only matrices\): give another optimizer"),
        ({"normalize_outer": True}, "normalize_outer=True without outer"),
    ],
)
def test_refusals(comm, settings, message):
    with pytest.raises(ValueError, match=message):
        local(Slope(), 2, **settings)


@pytest.mark.parametrize(
    "make",
    [
        lambda: hvdlocal.nesterov(0),
        lambda: hvdlocal.nesterov("0.7"),
        lambda: hvdlocal.nesterov(0.7, 1.0),
        lambda: hvdlocal.slowmo(-0.1),
    ],
)
def test_values_out_of_range(make):
    with pytest.raises(ValueError, match=r"(nesterov|slowmo)\((lr|momentum)="):
        make()


def test_embeddings_that_rescale_their_rows_are_refused(comm):
    model = torch.nn.Embedding(4, 3, max_norm=1.0)
    with pytest.raises(ValueError, match="has a max_norm"):
        local(model, 2, outer=hvdlocal.nesterov())


def test_ranks_with_different_outer_optimizers_are_refused(comm):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    with pytest.raises(hvdlocal.DisagreementError, match="outer"):
        local(Slope(), 2, outer=hvdlocal.nesterov(0.7 if comm.rank else 0.5))


def test_the_momentum_of_slowmo_rises_with_the_workers():
    assert [default_slowmo_momentum(k) for k in (1, 2, 3, 4, 7, 8, 15, 16, 1000)] == [
        0,
        0,
        0,
        0.2,
        0.2,
        0.5,
        0.5,
        0.6,
        0.6,
    ]
