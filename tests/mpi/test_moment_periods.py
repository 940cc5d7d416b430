"""Moments that are averaged with every n-th round only: which of them are equal on the ranks, and to what, and what is sent.

The gradient of every worker is a constant c, so a moment is a closed form: (1 − βⁿ)·c after n steps, with c² for the second one.
Averaging is linear, so a moment that was averaged after n steps is (1 − βⁿ)·mean(c), of which βʲ is left after j more steps.
"""

import io
import math

import pytest
import torch
from support.islands import island_of, means, odd
from support.models import Slope, backward, everywhere_equal, flat, local, mean, sgd, small_network, step

import hvdlocal

FIRST, SECOND = "exp_avg", "exp_avg_sq"
BETAS = {FIRST: 0.5, SECOND: 0.75}
NUMEL = 1600  # a multiple of the alignment, so that a moment adds as many elements as it has

PERIODS = [
    {FIRST: 3, SECOND: 6},
    {FIRST: 2, SECOND: 1},
    {SECOND: 2, FIRST: 2},
    {SECOND: 2},
    {FIRST: 1},
    {FIRST: 1, SECOND: 1},
]


def adamw(model, **settings):
    return torch.optim.AdamW(model.parameters(), lr=0.1, betas=tuple(BETAS.values()), **settings)


def gradients(comm, name):
    """What the moment of every worker is a mean of: its gradient, or the square of it."""
    return [c if name == FIRST else c * c for c in means(comm)]


def closed_form(comm, name, steps, averaged_after):
    """This rank's moment after so many steps, last averaged after some of them, or never (0)."""
    beta, values = BETAS[name], gradients(comm, name)
    left = beta ** (steps - averaged_after)
    return left * (1 - beta**averaged_after) * mean(values) + (1 - left) * values[island_of(comm)]


def check_moment(comm, optimizer, model, name, steps, averaged_after):
    moment = optimizer.state[model.w][name]
    expected = closed_form(comm, name, steps, averaged_after)
    torch.testing.assert_close(moment, torch.full_like(moment, expected), rtol=1e-5, atol=1e-6)
    distinct = len(set(comm.gather(moment.numpy().tobytes(), "test.moments")))
    assert distinct == (1 if steps == averaged_after else comm.num_islands)


@pytest.mark.parametrize("periods", PERIODS, ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_moment_is_averaged_in_the_rounds_that_its_period_divides(comm, periods, accumulate):
    """With accumulation a gradient is the mean of c − 1 and c + 1."""
    model = Slope(NUMEL)
    optimizer = local(model, 2, optimizer=adamw(model), momentum=periods, accumulate=accumulate)
    averaged_after = dict.fromkeys(BETAS, 0)
    for number in range(1, 8):
        for _ in range(2):
            for micro_batch in range(accumulate):
                step(optimizer, model, odd(comm)[comm.rank] + (2 * micro_batch - 1) * (accumulate - 1))
        assert optimizer.round == number
        for name in BETAS:
            if name in periods and number % periods[name] == 0:
                averaged_after[name] = 2 * number
            check_moment(comm, optimizer, model, name, 2 * number, averaged_after[name])
        assert everywhere_equal(comm, model.w.detach())


@pytest.mark.parametrize("island_period", [1, 2])
@pytest.mark.parametrize("periods", [{FIRST: 3, SECOND: 6}, {FIRST: 1, SECOND: 2}], ids=str)
def test_the_ranks_of_an_island_hold_the_same_moments(layout, periods, island_period):
    """Or, with parameters averaged inside of an island, the mean over all ranks when a moment is due."""
    comm = layout
    if island_period > comm.island_size:
        return
    model = Slope(NUMEL)
    optimizer = local(
        model, 2, optimizer=adamw(model), momentum=periods, island_period=island_period, communicator=comm
    )
    averaged_after = dict.fromkeys(BETAS, 0)
    for number in range(1, 8):
        for _ in range(2):
            step(optimizer, model, odd(comm)[comm.rank])
        for name, period in periods.items():
            if number % period == 0:
                averaged_after[name] = 2 * number
            if island_period == 1:
                check_moment(comm, optimizer, model, name, 2 * number, averaged_after[name])
            elif number % period == 0:
                squares = [c if name == FIRST else c * c for c in odd(comm)]
                expected = (1 - BETAS[name] ** (2 * number)) * mean(squares)
                moment = optimizer.state[model.w][name]
                torch.testing.assert_close(moment, torch.full_like(moment, expected))
        assert everywhere_equal(comm, model.w.detach())


@pytest.mark.parametrize("periods", PERIODS, ids=str)
def test_a_round_is_one_collective_with_the_moments_that_are_due(layout, periods):
    """Six rounds with periods of 3 and 6: three moments beside six times the parameters, (1 + 1/3 + 1/6) of their bytes."""
    comm = layout
    islands = comm.island_size > 1

    def bytes_of_rounds(momentum):
        model = Slope(NUMEL)
        optimizer = local(model, 1, optimizer=adamw(model), momentum=momentum, communicator=comm)
        traffic, sent = (comm.peers if islands else comm).traffic, []
        for _ in range(6):
            bytes_before, collectives_before = traffic.bytes, traffic.collectives
            step(optimizer, model, 1.0)
            assert traffic.collectives - collectives_before == (comm.num_islands > 1)
            sent.append((traffic.bytes - bytes_before) * comm.island_size)
        return sent

    without, sent = bytes_of_rounds("local"), bytes_of_rounds(periods)
    assert len(set(without)) == 1
    for number in range(1, 7):
        due = sum(number % period == 0 for period in periods.values())
        assert sent[number - 1] - without[0] == (4 * NUMEL * due if comm.num_islands > 1 else 0)


def test_the_slices_of_islands_are_aligned_whatever_is_due(layout):
    """Moments of 10 elements are filled up so that every rank of an island sends as much, a multiple of 64 bytes."""
    comm = layout
    model = Slope(10)
    optimizer = local(model, 1, optimizer=adamw(model), momentum={FIRST: 2, SECOND: 4}, communicator=comm)
    for number in range(1, 5):
        assert optimizer._flat_replica.sent(number).numel() % (16 * comm.island_size) == 0
        step(optimizer, model, odd(comm)[comm.rank])
        if number == 4:
            for name in BETAS:
                check_moment(comm, optimizer, model, name, 4, 4)


def train(comm, optimizer, model, steps):
    for i in steps:
        optimizer.zero_grad()
        optimizer.record_loss(backward(model, seed=100 * i + comm.rank))
        optimizer.step()


def moments(optimizer):
    return {
        (number, name): value
        for number, state in enumerate(optimizer.state.values())
        for name, value in state.items()
        if value is not None
    }


def assert_same_run(comm, settings, other_settings, inner):
    """Whether two runs of 12 steps have the same bits and bytes."""
    runs = []
    for momentum in (settings, other_settings):
        model = small_network()
        scaling = hvdlocal.LocalAdaScale()
        optimizer = local(model, 3, optimizer=inner(model), momentum=momentum, scaling=scaling)
        before = comm.traffic.bytes
        train(comm, optimizer, model, range(12))
        runs.append((flat(model), moments(optimizer), comm.traffic.bytes - before))
    (weights, kept, sent), (other_weights, other_kept, other_sent) = runs
    assert torch.equal(weights, other_weights)
    assert kept.keys() == other_kept.keys()
    assert all(torch.equal(kept[key], other_kept[key]) for key in kept)
    assert sent == other_sent


def amsgrad(model):
    return adamw(model, amsgrad=True)


def with_momentum(model):
    return sgd(model, lr=0.05, momentum=0.9)


@pytest.mark.parametrize(
    ("names", "inner"),
    [([SECOND, FIRST], adamw), ([FIRST, SECOND, "max_exp_avg_sq"], amsgrad), (["momentum_buffer"], with_momentum)],
)
def test_periods_of_one_are_the_policy_average(comm, names, inner):
    assert_same_run(comm, dict.fromkeys(names, 1), "average", inner)


@pytest.mark.parametrize("inner", [adamw, amsgrad])
def test_before_a_moment_is_due_a_run_is_that_of_the_policy_local(comm, inner):
    assert_same_run(comm, {FIRST: 5, SECOND: 10}, "local", inner)


def test_muons_momentum_is_averaged(comm):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = torch.nn.Linear(4, 4, bias=False)
    optimizer = local(
        model, 1, optimizer=torch.optim.Muon(model.parameters(), momentum=0.5), momentum={"momentum_buffer": 2}
    )
    for number in (1, 2):
        optimizer.zero_grad()
        model.weight.grad = torch.full((4, 4), float(comm.rank))
        optimizer.step()
        expected = 0.5 * comm.rank if number == 1 else 0.75 * mean(range(comm.size))  # v ← v/2 + c/2
        torch.testing.assert_close(optimizer.state[model.weight]["momentum_buffer"], torch.full((4, 4), expected))


@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("bad_round", [1, 2])
def test_a_replica_that_is_not_finite_is_left_out_of_the_moments(layout, bad_round, where):
    """Its island starts its moments anew, unless the round has given it those of the others.

    A gradient that is not finite is that of all ranks of an island, a loss is one rank's. That rank is the first of its island:
    another one sends the slice with the later moments.
    """
    comm = layout
    model = Slope(NUMEL)
    optimizer = local(model, 1, optimizer=adamw(model), momentum={FIRST: 1, SECOND: 2}, communicator=comm)
    for _ in range(bad_round - 1):
        step(optimizer, model, odd(comm)[comm.rank])
    bad = math.nan if comm.rank == comm.size - comm.island_size else 1.0
    optimizer.zero_grad()
    model(odd(comm)[comm.rank] * (bad if where == "gradient" else 1.0)).backward()
    optimizer.record_loss(bad)
    with pytest.raises(hvdlocal.NonFiniteError):
        optimizer.step()
    state = optimizer.state.get(model.w, {})
    others, mine = range(comm.num_islands - 1), island_of(comm)
    if not others or (mine not in others and bad_round == 1):
        assert not state
        return
    first, second = ([values[i] for i in others] for values in (gradients(comm, FIRST), gradients(comm, SECOND)))
    # Until round 2 the first moment was the mean over all in round 1, and halved.
    before = 0.25 * mean(gradients(comm, FIRST)) if bad_round == 2 else 0.0
    torch.testing.assert_close(state[FIRST], torch.full((NUMEL,), before + 0.5 * mean(first)))
    due = mean(second) if bad_round == 2 else second[mine]
    torch.testing.assert_close(state[SECOND], torch.full((NUMEL,), (1 - 0.75**bad_round) * due))


def test_training_goes_on_after_a_replica_that_was_not_finite(comm):
    model = Slope(NUMEL)
    optimizer = local(model, 1, optimizer=adamw(model), momentum={FIRST: 1, SECOND: 2})
    with pytest.raises(hvdlocal.NonFiniteError):
        step(optimizer, model, math.nan if comm.rank == 0 else 1.0)
    if comm.size == 1:
        return
    step(optimizer, model, 1.0)
    assert bool(model.w.isfinite().all())
    # Rank 0 has the second moment of one step now, the others that of two.
    expected = mean([0.25] + [1 - 0.75**2] * (comm.size - 1))
    torch.testing.assert_close(optimizer.state[model.w][SECOND], torch.full((NUMEL,), expected))


@pytest.mark.parametrize("due", [True, False])
def test_a_moment_that_is_not_finite_is_found_when_it_is_due(comm, due):
    """An infinite second moment stops the weights that it belongs to, and is seen nowhere else."""
    model = Slope(NUMEL)
    optimizer = local(model, 1, optimizer=adamw(model), momentum={SECOND: 2 if due else 3})
    step(optimizer, model, 1.0)
    if comm.rank == 0:
        optimizer.state[model.w][SECOND].fill_(math.inf)
    if due:
        with pytest.raises(hvdlocal.NonFiniteError, match="in the sum over all ranks"):
            step(optimizer, model, 1.0)
    else:
        step(optimizer, model, 1.0)


@pytest.mark.parametrize("interrupt", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("scaling", [hvdlocal.LocalAdaScale(), hvdlocal.LocalAdaScale(stale=False)], ids=str)
def test_resumption_is_bit_identical(comm, interrupt, scaling):
    def make(model):
        return local(model, 2, optimizer=adamw(model), momentum={FIRST: 2, SECOND: 4}, scaling=scaling)

    model = small_network()
    whole = make(model)
    train(comm, whole, model, range(11))

    first = small_network()
    before = make(first)
    train(comm, before, first, range(interrupt))
    saved = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": before.state_dict()}, saved)

    second = small_network(seed=1)
    after = make(second)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    second.load_state_dict(state["model"])
    after.load_state_dict(state["optimizer"])
    train(comm, after, second, range(interrupt, 11))
    assert torch.equal(flat(second), flat(model))
    resumed, uninterrupted = moments(after), moments(whole)
    assert all(torch.equal(resumed[key], uninterrupted[key]) for key in uninterrupted)
    assert (after.round, after.grad_sqr, after.divergence) == (whole.round, whole.grad_sqr, whole.divergence)


@pytest.mark.parametrize("stale", [True, False])
@pytest.mark.parametrize("kind", ["exact", "sketch"])
def test_gradient_statistics_travel_beside_the_moments(layout, stale, kind):
    """The gradients do not depend on the weights, so neither do the statistics on the moments."""
    comm, runs = layout, []
    for momentum in ("local", {FIRST: 2, SECOND: 4}):
        model = Slope(NUMEL)
        scaling = hvdlocal.LocalAdaScale(stale=stale, statistics=kind)
        optimizer = local(model, 1, optimizer=adamw(model), momentum=momentum, scaling=scaling, communicator=comm)
        traffic = (comm.peers if comm.island_size > 1 else comm).traffic
        before = traffic.bytes
        for _ in range(4):
            step(optimizer, model, odd(comm)[comm.rank])
        runs.append((optimizer.grad_sqr, optimizer.grad_var, optimizer.gain))
        runs[-1] += (traffic.bytes - before,)
        if momentum != "local":
            for name in BETAS:
                check_moment(comm, optimizer, model, name, 4, 4)
    assert runs[0][:3] == runs[1][:3]
    # Of four rounds, two send the first moment and one the second; across islands a rank sends its slice.
    assert runs[1][3] - runs[0][3] == (3 * 4 * NUMEL // comm.island_size if comm.num_islands > 1 else 0)


@pytest.mark.parametrize("periods", [{FIRST: 1, SECOND: 2}, {FIRST: 2, SECOND: 4}], ids=str)
def test_a_moment_is_carried_over_when_its_average_comes_later(layout, periods):
    """One step later, half of the first moment's mean and three quarters of the second one's are left, as without overlap."""
    comm = layout
    model = Slope(NUMEL)
    optimizer = local(model, 2, optimizer=adamw(model), momentum=periods, overlap=1, communicator=comm)
    averaged_after = dict.fromkeys(BETAS, 0)
    for steps in range(1, 12):
        step(optimizer, model, odd(comm)[comm.rank])
        if steps % 2 and comm.num_islands > 1:  # the average of the round before has been applied
            for name, period in periods.items():
                if steps // 2 % period == 0:
                    averaged_after[name] = steps - 1
                check_moment(comm, optimizer, model, name, steps, averaged_after[name])


def test_synchronize_ends_a_round_of_its_own(comm):
    model = Slope(NUMEL)
    optimizer = local(model, 4, optimizer=adamw(model), momentum={FIRST: 2})
    step(optimizer, model, odd(comm)[comm.rank])
    optimizer.synchronize()
    check_moment(comm, optimizer, model, FIRST, 1, 0)
    step(optimizer, model, odd(comm)[comm.rank])
    optimizer.synchronize()
    optimizer.synchronize()  # between two rounds: nothing is averaged
    assert optimizer.round == 2
    check_moment(comm, optimizer, model, FIRST, 2, 2)


def test_a_moment_that_is_switched_on_later_stays_local(comm):
    model = Slope(NUMEL)
    optimizer = local(model, 1, optimizer=adamw(model), momentum={FIRST: 1, SECOND: 1})
    for group in optimizer.param_groups:
        group["amsgrad"] = True
    step(optimizer, model, odd(comm)[comm.rank])
    expected = 0.25 * gradients(comm, SECOND)[comm.rank]
    torch.testing.assert_close(optimizer.state[model.w]["max_exp_avg_sq"], torch.full((NUMEL,), expected))
    check_moment(comm, optimizer, model, SECOND, 1, 1)


REFUSED = [
    ({}, adamw, "momentum={}: choose one of local, average, reset, or give moments"),
    ([FIRST], adamw, "choose one of local, average, reset, or give moments"),
    ({"momentum_buffer": 2}, adamw, "this AdamW keeps no 'momentum_buffer'; choose among exp_avg, exp_avg_sq"),
    ({"max_exp_avg_sq": 2}, adamw, "keeps no 'max_exp_avg_sq'; choose among exp_avg, exp_avg_sq"),
    ({"momentum_buffer": 2}, sgd, "this SGD keeps no 'momentum_buffer'; choose 'local', or build it with a momentum"),
    ({FIRST: 2, SECOND: 3}, adamw, "the period of exp_avg_sq, 3, must be a multiple of 2, .* choose 2 or 4"),
    ({FIRST: 7, SECOND: 3}, adamw, "the period of exp_avg, 7, must be a multiple of 3, that of exp_avg_sq"),
    ({FIRST: 0}, adamw, "the period of exp_avg must be a whole number of at least 1"),
    ({FIRST: 1.5}, adamw, "the period of exp_avg must be a whole number"),
    ({FIRST: "3"}, adamw, "the period of exp_avg must be a whole number"),
    ({FIRST: True}, adamw, "the period of exp_avg must be a whole number"),
]


@pytest.mark.parametrize(("momentum", "inner", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_periods_without_a_meaning_are_refused(comm, momentum, inner, message):
    model = Slope()
    with pytest.raises(ValueError, match=message):
        local(model, optimizer=inner(model), momentum=momentum)


def test_periods_that_differ_between_the_ranks_are_refused(comm):
    model = Slope()
    last = comm.rank == comm.size - 1 > 0
    if comm.size == 1:
        return
    with pytest.raises(hvdlocal.DisagreementError, match="momentum: rank"):
        local(model, optimizer=adamw(model), momentum={FIRST: 4 if last else 2})
