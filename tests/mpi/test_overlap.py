"""An average that is applied some steps after it was begun: closed forms, what the model is meanwhile, state."""

import copy
import math
import warnings

import pytest
import torch
from support.islands import with_islands
from support.models import Slope, everywhere_equal, local, sgd, step

import hvdlocal


def slope_of(comm) -> float:
    """A different gradient on every rank, 1 and 3 on two; their mean is 2."""
    return 2 * (1 + 2 * comm.rank) / comm.size


def train(comm, steps, period=2, **settings):
    """The model after each of the steps and after `synchronize`, with g(k) = `slope_of` and learning rate 1, from 0."""
    model = Slope(start=0.0)
    optimizer = local(model, period, **settings)
    found = []
    for _ in range(steps):
        step(optimizer, model, slope_of(comm))
        found.append(model.w.tolist()[0])
    optimizer.synchronize()
    assert optimizer.in_sync
    assert everywhere_equal(comm, model.w.detach())
    return found, model.w.tolist()[0]


def test_steps_are_carried_over(comm):
    """H = 2, τ = 1: after step 3 the mean −4 and this rank's step, after step 5 the mean −8 and its step; −12 at the end."""
    g = slope_of(comm)
    found, end = train(comm, 6, overlap=1)
    assert found == pytest.approx([-g, -2 * g, -4 - g, -4 - 2 * g, -8 - g, -8 - 2 * g])
    assert end == pytest.approx(-12)


@pytest.mark.parametrize("overlap", [2, 3, 100])
def test_a_round_that_is_no_longer_than_the_overlap_applies_the_mean_at_its_end(comm, overlap):
    """The mean −4 comes after step 4, with two steps carried over, and only then is the next average begun."""
    g = slope_of(comm)
    found, end = train(comm, 7, overlap=overlap)
    assert found == pytest.approx([-g, -2 * g, -3 * g, -4 - 2 * g, -4 - 3 * g, -8 - 2 * g, -8 - 3 * g])
    assert end == pytest.approx(-14)


def test_with_an_outer_optimizer(comm):
    """With constant gradients overlap changes nothing of φ: −5.32, then −12.908, and the replica is one step further."""
    g = slope_of(comm)
    found, end = train(comm, 5, overlap=1, outer=hvdlocal.nesterov(0.7, 0.9))
    assert found[2] == pytest.approx(-5.32 - g)
    assert found[4] == pytest.approx(-12.908 - g)
    # The step of the round that `synchronize` ends: Δ = 2, m = 0.9 · 7.6 + 2 = 8.84, φ = −12.908 − 0.7 (2 + 0.9 · 8.84)
    assert end == pytest.approx(-12.908 - 0.7 * (2 + 0.9 * 8.84))


def test_the_mean_is_mixed_in(comm):
    """α = 0.5: after step 3, half of −3g and half of −4; after step 5, half of that less 2g and half of the mean of what was sent
    after step 4.
    """
    g = slope_of(comm)
    found, end = train(comm, 5, overlap=1, mixing=0.5)
    third = 0.5 * -3 * g + 0.5 * -4
    assert found[2] == pytest.approx(third)
    # The mean of −3g is −6, so that of what was sent after step 4 is −5 − 2 = −7.
    assert found[4] == pytest.approx(0.5 * (third - 2 * g) + 0.5 * -7)
    # The mean of what the replicas are after step 5: 0.5 (−5 − 4) + 0.5 (−7) = −8.
    assert end == pytest.approx(-8)


def test_mixing_zero_takes_the_mean_alone(comm):
    found, _ = train(comm, 3, overlap=1, mixing=0.0)
    assert found[2] == pytest.approx(-4)


@pytest.mark.parametrize("mixing", [None, 0.5])
def test_synchronize_right_after_a_round_takes_the_mean_as_it_is(comm, mixing):
    """No step was taken meanwhile, so that there is nothing to carry over or to mix."""
    model = Slope(start=0.0)
    optimizer = local(model, 2, overlap=1, mixing=mixing)
    for _ in range(2):
        step(optimizer, model, slope_of(comm))
    assert not optimizer.in_sync
    before = comm.traffic.collectives
    optimizer.synchronize()
    assert comm.traffic.collectives - before == (1 if comm.size > 1 else 0), "the comparison of what must be equal"
    assert optimizer.in_sync
    assert model.w.tolist() == pytest.approx([-4.0] * 10)
    assert everywhere_equal(comm, model.w.detach())


def test_the_round_that_uses_up_the_budget_waits(comm):
    model = Slope(start=0.0)
    optimizer = local(model, 2, overlap=1, budget=6)
    synchronous = []
    while not optimizer.finished:
        step(optimizer, model, slope_of(comm))
        synchronous.append(optimizer.in_sync)
    assert synchronous == [False] * 5 + [True]
    assert model.w.tolist() == pytest.approx([-12.0] * 10)
    assert optimizer.round == 3


@pytest.mark.parametrize("overlap", [1, 3, 4, 9])
def test_one_collective_a_round(comm, overlap):
    model = Slope(start=0.0)
    optimizer = local(model, 4, overlap=overlap, scaling=hvdlocal.LocalAdaScale())
    before = comm.traffic.collectives
    for _ in range(16):
        step(optimizer, model, slope_of(comm))
    assert comm.traffic.collectives - before == (4 if comm.size > 1 else 0)
    assert optimizer.round == 4


def test_no_overlap_is_what_it_was(comm):
    """Random gradients: τ = 0 gives the bits of an optimizer without the argument."""
    torch.manual_seed(comm.rank)
    gradients = torch.randn(9, 100)

    def end(**settings):
        model = Slope(100)
        optimizer = local(model, 3, optimizer=sgd(model, lr=0.1, momentum=0.9), momentum="average", **settings)
        for gradient in gradients:
            optimizer.zero_grad()
            (model.w * gradient).sum().backward()
            optimizer.step()
        return model.w.detach()

    assert torch.equal(end(overlap=0, mixing=None), end())


def test_an_average_that_was_begun_leaves_the_model_free(comm):
    """The collective runs on memory of its own while forward and backward passes, and a whole step, use the model."""
    model = Slope(numel=1_000_000, start=0.0)
    optimizer = local(model, 4, overlap=1)
    for _ in range(4):
        step(optimizer, model, slope_of(comm))
    assert model(1.0).item() == pytest.approx(-4 * slope_of(comm) * 1_000_000, rel=1e-4)
    step(optimizer, model, slope_of(comm))
    assert model.w[:3].tolist() == pytest.approx([-8 - slope_of(comm)] * 3)


def test_two_models_average_at_the_same_time(comm):
    """As a generator and a discriminator do: each average is under way while the other model steps and averages."""
    models = [Slope(start=0.0) for _ in range(2)]
    optimizers = [local(model, 2, overlap=1) for model in models]
    for _ in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(optimizer, model, slope_of(comm))
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.synchronize()
        assert model.w.tolist()[0] == pytest.approx(-10)


def test_hidden_and_exposed_time(comm):
    model = Slope(numel=1_000_000, start=0.0)
    optimizer = local(model, 4, overlap=3)
    for _ in range(9):
        step(optimizer, model, slope_of(comm))
    if comm.size == 1:
        assert optimizer.seconds_hidden == optimizer.seconds_averaging == 0
    else:
        assert optimizer.seconds_hidden > 0
    plain = local(model, 4)
    for _ in range(9):
        step(plain, model, slope_of(comm))
    assert plain.seconds_hidden == 0


# -- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0, 1, 2, 3, 8])
def test_statistics_come_from_the_first_gradients_after_an_application(comm, overlap):
    """The gradient of step i on rank k is i (1 + 2k): which of them gave an estimate can be read off ‖ḡ‖² and σ²."""
    if comm.size == 1:
        pytest.skip("one rank has no statistics of this kind")
    model = Slope(numel=64, start=0.0)
    scaling = hvdlocal.LocalAdaScale(smoothing=0.0, statistics="exact")
    optimizer = local(model, 3, overlap=overlap, scaling=scaling, optimizer=sgd(model, lr=1e-3))
    found, estimates, update = [], [], optimizer._smoothed.update
    optimizer._smoothed.update = lambda *args: (estimates.append(args), update(*args))
    for number in range(1, 13):
        step(optimizer, model, number * (1 + 2 * comm.rank))
        sum_sqr = sum((1 + 2 * k) ** 2 for k in range(comm.size))
        variance_of_ones = 64 / (comm.size - 1) * (sum_sqr - comm.size**3)  # the mean over the ranks is K
        found.append(None if optimizer.grad_var is None else round((optimizer.grad_var / variance_of_ones) ** 0.5, 3))
    expected = {
        # Rounds are the steps 1–3, 4–6, 7–9, 10–12. Without overlap, what the first step of a round gave is used at its end.
        0: [None, None, 1, 1, 1, 4, 4, 4, 7, 7, 7, 10],
        # The first step's at the end of round 2; then those of the steps after an application.
        1: [None] * 5 + [1, 1, 1, 5, 5, 5, 8],
        2: [None] * 5 + [1, 1, 1, 6, 6, 6, 9],
        # At a round's end the mean is applied, then the next is begun: the first step of a round is the first after it.
        3: [None] * 5 + [1, 1, 1, 1, 1, 1, 7],
        8: [None] * 5 + [1, 1, 1, 1, 1, 1, 7],
    }
    assert found == expected[overlap]
    assert len(estimates) == len({*expected[overlap]} - {None}), "none is made of statistics that were sent before"


def test_a_gain_does_not_change_within_a_round(comm):
    torch.manual_seed(comm.rank)
    model = Slope(numel=200, start=0.0)
    optimizer = local(model, 4, overlap=2, scaling=hvdlocal.LocalAdaScale(), budget=40, optimizer=sgd(model, lr=1e-3))
    gains, steps_in_round = [], []
    while not optimizer.finished:
        optimizer.zero_grad()
        (model.w * torch.randn(200)).sum().backward()
        optimizer.step()
        gains.append(optimizer.gain)
        steps_in_round.append(optimizer.steps_in_round)
    for before, now, place in zip(gains, gains[1:], steps_in_round, strict=False):
        assert place == 0 or before == now
    if comm.size > 1:
        assert len(set(gains)) > 2


# -- moments, buffers, replicas that are not finite --------------------------------------------------------------------


def test_averaged_moments_are_carried_over(comm):
    """SGD with momentum 0.5 and constant gradient g: m = g, 1.5g, 1.75g …; sent after step 2, applied after step 3.

    What is left of the 1.5g that was sent is 0.75g, so that it becomes g + 0.5 · 1.5 · 2 = g + 1.5.
    """
    g = slope_of(comm)
    model = Slope(start=0.0)
    optimizer = local(model, 2, optimizer=sgd(model, momentum=0.5), overlap=1, momentum="average")
    for _ in range(3):
        step(optimizer, model, g)
    moment = optimizer.state[model.w]["momentum_buffer"]
    assert moment.tolist() == pytest.approx([g + 1.5] * 10)
    # Sent was −(1 + 1.5) g, whose mean is −5; the third step, at the rank's own moment, was −1.75 g.
    assert model.w.tolist() == pytest.approx([-5 - 1.75 * g] * 10)


def test_second_moments_never_become_negative(comm):
    model = Slope(1000, start=0.0)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.5, 0.5))
    optimizer = local(model, 2, optimizer=inner, overlap=2, momentum="average")
    torch.manual_seed(comm.rank)
    for number in range(12):
        optimizer.zero_grad()
        # Large gradients on some ranks and elements, none on others.
        (model.w * torch.randn(1000) * (10.0 ** (3 * ((number + comm.rank) % 3) - 6))).sum().backward()
        optimizer.step()
        assert bool((inner.state[model.w]["exp_avg_sq"] >= 0).all())
        assert bool(model.w.isfinite().all())


def test_averaged_buffers_are_replaced_by_their_mean(comm):
    model = torch.nn.BatchNorm1d(3)
    optimizer = local(model, 1, overlap=1, optimizer=sgd(model, lr=0.0))
    x = torch.full((4, 3), float(comm.rank + 1))
    for _ in range(2):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    mean = sum(range(1, comm.size + 1)) / comm.size
    assert model.running_mean.tolist() == pytest.approx(
        [0.1 * mean] * 3
    )  # that of the first step, after the second one


@pytest.mark.parametrize("mixing", [None, 0.5])
def test_a_rank_that_is_not_finite_takes_the_mean_of_the_others(comm, mixing):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    g = slope_of(comm)
    model = Slope(start=0.0)
    optimizer = local(model, 2, overlap=1, mixing=mixing)
    step(optimizer, model, g)
    step(optimizer, model, float("nan") if comm.rank == 1 else g)
    with pytest.raises(hvdlocal.NonFiniteError, match=r"on rank 1 of"):
        step(optimizer, model, g)
    others = [2 * (1 + 2 * k) / comm.size for k in range(comm.size) if k != 1]
    mean = -2 * sum(others) / len(others)
    kept = mean - g if mixing is None else 0.5 * -3 * g + 0.5 * mean
    assert model.w.tolist() == pytest.approx([mean if comm.rank == 1 else kept] * 10)
    optimizer.synchronize()
    assert everywhere_equal(comm, model.w.detach())


@pytest.mark.parametrize("by_synchronize", [False, True])
def test_a_round_ends_although_the_average_before_was_not_finite(comm, by_synchronize):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    g = slope_of(comm)
    model = Slope(start=0.0)
    optimizer = local(model, 2, overlap=2)
    step(optimizer, model, g)
    step(optimizer, model, float("nan") if comm.rank == 1 else g)
    step(optimizer, model, g)
    with pytest.raises(hvdlocal.NonFiniteError, match=r"on rank 1 of"):
        optimizer.synchronize() if by_synchronize else step(optimizer, model, g)
    assert (optimizer.round, optimizer.steps_in_round, optimizer.in_sync) == (2, 0, by_synchronize)
    if not by_synchronize:
        step(optimizer, model, g)
        optimizer.synchronize()
    assert everywhere_equal(comm, model.w.detach())


@pytest.mark.parametrize("mixing", [None, 0.5])
def test_averaged_buffers_that_are_not_finite_are_replaced(comm, mixing):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    model = torch.nn.BatchNorm1d(3)
    optimizer = local(model, 1, overlap=1, mixing=mixing, optimizer=sgd(model, lr=0.0))

    def train():
        optimizer.zero_grad()
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()

    if comm.rank == 1:
        model.running_mean.fill_(math.nan)
    train()
    with pytest.raises(
        hvdlocal.NonFiniteError, match=r"'running_mean' on rank 1: they are now the average of the other"
    ):
        train()
    assert model.running_mean.tolist() == pytest.approx([0.1] * 3)  # that of the first step on the others
    optimizer.synchronize()
    assert everywhere_equal(comm, model.running_mean)


def test_a_stop_and_the_loss_come_with_the_application(comm):
    model = Slope(start=0.0)
    optimizer = local(model, 2, overlap=1)
    if comm.rank == comm.size - 1:
        optimizer.request_stop()
    seen = []
    for _ in range(3):
        step(optimizer, model, slope_of(comm))
        seen.append((optimizer.stop_requested, optimizer.loss is None))
    assert seen == [(False, True), (False, True), (True, False)]


def test_divergence_is_that_of_what_was_sent(comm):
    """H = 2, τ = 1: after the first round the replicas are at −2g, and their mean is −4; each later round adds 2 (g − 2) more."""
    model = Slope(numel=5, start=0.0)
    optimizer = local(model, 2, overlap=1)
    found = []
    for _ in range(5):
        step(optimizer, model, slope_of(comm))
        found.append(optimizer.divergence)
    at_the_mean = optimizer._sample.origin[:5].tolist()  # the rest is padding
    spread = sum((2 * (1 + 2 * k) / comm.size - 2) ** 2 for k in range(comm.size)) / comm.size
    assert found[:2] == [None, None]
    assert found[2:4] == pytest.approx([5 * 4 * spread] * 2, abs=1e-5)
    assert found[4] == pytest.approx(
        5 * 4 * spread, abs=1e-4
    )  # −4 − 2g again: the step that was carried over and one more
    assert at_the_mean == pytest.approx([-8.0] * 5), "distances are measured from the mean, which is equal on all ranks"


# -- islands and rates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [None, hvdlocal.nesterov(0.7, 0.9)])
@pytest.mark.parametrize("island_period", [1, 2])
def test_islands(comm, outer, island_period):
    """2 × 2 ranks as two workers with the islands' mean gradients; inside of an island the bits are equal after every average."""
    if comm.size != 4:
        pytest.skip("needs four ranks")
    torch.manual_seed(0)
    gradients = torch.randn(14, 4, 1001)

    def end(communicator, gradient_of, **settings):
        model = Slope(1001, start=0.5)
        optimizer = local(model, 4, communicator=communicator, outer=outer, overlap=2, **settings)
        for now in gradients:
            optimizer.zero_grad()
            (model.w * gradient_of(now)).sum().backward()
            optimizer.step()
        optimizer.synchronize()
        assert everywhere_equal(comm, model.w.detach())
        return model.w.detach()

    # With SGD, steps with own gradients and an average inside make the same mean as steps with the mean gradient.
    islands = end(with_islands(comm, 2), lambda now: now[comm.rank], island_period=island_period)
    plain = end(comm, lambda now: now.view(2, 2, -1).mean(1)[comm.rank // 2])
    assert torch.allclose(islands, plain, atol=1e-5)


@pytest.mark.parametrize("policy", ["local", "average", "reset"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_random_gradients_agree_with_a_simulation(comm, policy, accumulate):
    """Float64 on one process, written from the rule: φ + (θ − s)."""
    workers, periods, overlap = comm.size, 3, 2
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(11, accumulate, workers, 20, generator=generator, dtype=torch.float64)

    model = Slope(20, start=0.0)
    inner = sgd(model, lr=0.1, momentum=0.5)
    optimizer = local(model, periods, optimizer=inner, overlap=overlap, momentum=policy, accumulate=accumulate)
    w = torch.zeros(workers, 20, dtype=torch.float64)
    m, first = torch.zeros_like(w), [True] * workers
    sent = None
    for number, micro in enumerate(gradients):
        for one in micro:
            optimizer.zero_grad()
            (model.w * one[comm.rank].float()).sum().backward()
            optimizer.step()
        g = micro.mean(0)
        m = torch.stack([g[k] if first[k] else 0.5 * m[k] + g[k] for k in range(workers)])
        first = [False] * workers
        w = w - 0.1 * m
        place = number % periods + 1
        if sent and place == overlap:
            w = sent[0].mean(0) + (w - sent[0])
            if policy == "average":
                m = m + 0.5**overlap * (sent[1].mean(0) - sent[1])
            if policy == "reset":
                m, first = torch.zeros_like(m), [True] * workers
            sent = None
        if place == periods:
            sent = w.clone(), m.clone()
        assert model.w.tolist() == pytest.approx(w[comm.rank].tolist(), abs=1e-5)


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize(
    "settings",
    [
        {"overlap": 1},
        {"overlap": 3},
        {"overlap": 2, "mixing": 0.3},
        {"overlap": 2, "outer": hvdlocal.slowmo(0.5), "momentum": "average", "scaling": hvdlocal.LocalAdaScale()},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_a_state_continues_bit_for_bit(comm, steps, settings):
    """Saved after any step, inside an overlap too: the average that was under way is repeated."""
    torch.manual_seed(comm.rank)
    gradients = torch.randn(11, 50)

    def make():
        model = Slope(50, start=0.5)
        return model, local(model, 3, optimizer=sgd(model, lr=0.1, momentum=0.9), **settings)

    def go(model, optimizer, some):
        for gradient in some:
            optimizer.zero_grad()
            loss = (model.w * gradient).sum()
            loss.backward()
            optimizer.record_loss(loss)
            optimizer.step()

    whole, reference = make()
    go(whole, reference, gradients[:steps])
    model_state, state = copy.deepcopy((whole.state_dict(), reference.state_dict()))
    go(whole, reference, gradients[steps:])
    model, optimizer = make()
    model.load_state_dict(model_state)
    optimizer.load_state_dict(state)
    again = copy.deepcopy(optimizer.state_dict())  # a second interruption before the first step
    model, optimizer = make()
    model.load_state_dict(model_state)
    optimizer.load_state_dict(again)
    assert optimizer.in_sync == (reference.round == -1)
    go(model, optimizer, gradients[steps:])
    for one in (reference, optimizer):
        one.synchronize()
    assert torch.equal(model.w, whole.w)
    assert torch.equal(optimizer.state[model.w]["momentum_buffer"], reference.state[whole.w]["momentum_buffer"])
    assert (optimizer.loss, optimizer.divergence, optimizer.gain) == (
        reference.loss,
        reference.divergence,
        reference.gain,
    )
    assert (optimizer.grad_var, optimizer.round) == (reference.grad_var, reference.round)


def test_a_run_can_go_back_while_an_average_is_under_way(comm):
    model = Slope(2_000_000, start=0.0)  # so many that its sum takes longer than a step
    optimizer = local(model, 2, overlap=2)
    for _ in range(3):
        step(optimizer, model, slope_of(comm))
    model_state, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for steps in (1, 2, 3):
        for _ in range(steps):
            step(optimizer, model, 7 * slope_of(comm))
        model.load_state_dict(model_state)
        optimizer.load_state_dict(copy.deepcopy(state))
        for _ in range(3):
            step(optimizer, model, slope_of(comm))
        optimizer.synchronize()
        assert torch.equal(model.w, torch.full_like(model.w, -12.0))


@pytest.mark.parametrize("settings", [{}, {"momentum": {"exp_avg": 2}}])
def test_a_state_inside_an_overlap_of_another_message_is_refused(comm, settings):
    """An average of the first moments has as many numbers as one of the second moments."""

    def make(**settings):
        model = Slope()
        return model, local(model, 2, optimizer=torch.optim.Adam(model.parameters()), overlap=1, **settings)

    model, optimizer = make(momentum={"exp_avg_sq": 2})
    for _ in range(4):
        step(optimizer, model, slope_of(comm))
    state = optimizer.state_dict()
    with pytest.raises(
        ValueError, match=r"under way, with the moments \{'exp_avg_sq': 2\}, and here it would be one of"
    ):
        make(**settings)[1].load_state_dict(state)
    optimizer.synchronize()


def test_a_state_inside_an_overlap_belongs_to_its_rank(comm):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    model = Slope()
    optimizer = local(model, 2, overlap=1)
    for _ in range(2):
        step(optimizer, model, slope_of(comm))
    states = comm.gather(optimizer.state_dict(), "test.states")
    optimizer.synchronize()
    with pytest.raises(ValueError, match="in the middle of a round by rank"):
        optimizer.load_state_dict(states[(comm.rank + 1) % comm.size])
    with pytest.raises(ValueError, match="which needs overlap=… of the optimizer that saved it"):
        local(Slope(), 2).load_state_dict(states[comm.rank])


@pytest.mark.parametrize(("steps", "outer"), [(2, None), (3, None), (4, hvdlocal.nesterov(0.7, 0.9))])
def test_other_ranks_go_on_from_the_average_of_the_replicas(comm, steps, outer):
    """The average that was under way and the steps since are one round: Δ = 2 · steps from where both began."""
    model = Slope(start=0.0)
    optimizer = local(model, 2, overlap=1, outer=outer)
    for _ in range(steps):
        step(optimizer, model, slope_of(comm))
    state = copy.deepcopy(optimizer.state_dict())
    assert state["hvdlocal"]["pending"] if steps % 2 == 0 else not state["hvdlocal"]["pending"]
    total = torch.tensor([model.w[0].item()])
    comm.sum_(total, "test.mean")
    optimizer.synchronize()
    average = total.item() / comm.size
    other = Slope(start=average)
    resumed = local(other, 2, overlap=1, outer=outer)
    resumed.load_averaged_state_dict(state, progress=float(steps))
    assert resumed.in_sync
    # With the outer optimizer: φ₁ = −5.32 and the replicas' mean −9.32, so Δ = 4, as in the second round of its hand values.
    assert other.w.tolist() == pytest.approx([-12.908 if outer else -2.0 * steps] * 10)
    assert everywhere_equal(comm, other.w.detach())


@pytest.mark.parametrize(("mixing", "warned"), [(None, True), (0.5, True), (0.0, False)])
def test_statistics_of_replicas_that_have_drifted_apart_are_warned_of(comm, mixing, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        local(Slope(), 2, overlap=1, mixing=mixing, scaling=hvdlocal.LocalAdaScale())
    told = [str(one.message) for one in caught if "have drifted 1 steps apart" in str(one.message)]
    assert len(told) == (warned and comm.rank == 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap": -1}, "overlap=-1: give a whole number of steps"),
        ({"overlap": 1.5}, "overlap=1.5: give a whole number of steps"),
        ({"mixing": 0.5}, "mixing=0.5 without overlap"),
        ({"overlap": 1, "mixing": 1.0}, "mixing=1.0: give 0 ≤ mixing < 1"),
        (
            {"overlap": 1, "scaling": hvdlocal.LocalAdaScale(stale=False)},
            "its statistics would be sent at the first step",
        ),
    ],
)
def test_refusals(comm, settings, message):
    with pytest.raises(ValueError, match=message):
        local(Slope(), 2, **settings)


def test_largest_second_moments_cannot_be_carried_over(comm):
    model = Slope()
    inner = torch.optim.AdamW(model.parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="largest second moments of amsgrad"):
        local(model, 2, optimizer=inner, momentum="average", overlap=1)
    inner = torch.optim.AdamW(model.parameters(), amsgrad=True)
    optimizer = local(model, 2, optimizer=inner, momentum="average", overlap=1, mixing=0.5)
    for _ in range(5):
        step(optimizer, model, slope_of(comm))

    assert bool((inner.state[model.w]["max_exp_avg_sq"] > 0).all())
