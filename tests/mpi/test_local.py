"""LocalOptimizer: what an averaging computes, how many collectives it takes, and when it happens."""

import math

import pytest
import torch
from support.models import (
    Slope,
    backward,
    batch,
    everywhere_equal,
    flat,
    flat_gradient,
    local,
    mean,
    sgd,
    slopes,
    small_network,
    step,
)

import hvdlocal


def test_average_is_the_mean_of_the_replicas(comm):
    c = slopes(comm)
    model = Slope()
    optimizer = local(model, 4)
    for _ in range(3):
        step(optimizer, model, c[comm.rank])
    assert torch.equal(model.w, torch.full((10,), 5 - 3 * c[comm.rank])), "local steps first"
    assert not optimizer.in_sync
    step(optimizer, model, c[comm.rank])
    assert optimizer.in_sync
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 5 - 4 * mean(c)))
    assert everywhere_equal(comm, model.w.detach())
    variance = mean([(x - mean(c)) ** 2 for x in c])
    assert optimizer.divergence == pytest.approx(10 * 4**2 * variance, rel=1e-5)
    assert optimizer.loss == pytest.approx(mean([x * 10 * (5 - i * x) for i in range(4) for x in c]), rel=1e-6)
    assert (optimizer.round, optimizer.steps_in_round, optimizer.progress) == (1, 0, 4)


def test_all_ranks_start_from_rank_0(comm):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(comm.rank + 1)
    model[0].bias.requires_grad_(False)
    local(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        assert torch.equal(tensor, torch.ones_like(tensor))


SCALINGS = [
    (hvdlocal.NoScaling(), 1),
    (hvdlocal.LinearScaling(warmup=0), 1),
    (hvdlocal.LocalAdaScale(), 1),
    (hvdlocal.LocalAdaScale(statistics="exact"), 1),
    (hvdlocal.LocalAdaScale(stale=False), 2),
]


@pytest.mark.parametrize(("scaling", "per_round"), SCALINGS, ids=str)
@pytest.mark.parametrize("momentum", ["local", "average", "reset"])
def test_collectives_per_round_are_counted(comm, scaling, per_round, momentum):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 5), torch.nn.BatchNorm1d(5))
    optimizer = local(model, 3, optimizer=sgd(model, lr=0.01, momentum=0.9), scaling=scaling, momentum=momentum)
    before = comm.traffic.collectives
    for i in range(12):
        optimizer.zero_grad()
        x, _ = batch(i)
        model(x).square().mean().backward()
        optimizer.step()
    assert optimizer.round == 4
    assert comm.traffic.collectives - before == (4 * per_round if comm.size > 1 else 0)


def payload(comm, optimizer_of) -> int:
    """Bytes of one averaging of a model of 100,000 parameters."""
    model = Slope(100_000)
    optimizer = optimizer_of(model)
    before = comm.traffic.bytes
    step(optimizer, model, 1.0)
    return comm.traffic.bytes - before


def test_payload_of_the_statistics(comm):
    plain = payload(comm, lambda model: local(model))
    sketch = payload(comm, lambda model: local(model, scaling=hvdlocal.LocalAdaScale(sketch_size=1024)))
    exact = payload(comm, lambda model: local(model, scaling=hvdlocal.LocalAdaScale(statistics="exact")))
    if comm.size == 1:
        assert plain == sketch == exact == 0
        return
    assert plain - 400_000 < 200
    assert sketch - plain == 4 * (1024 + 16)
    assert exact - plain == 4 * (100_000 + 16)


@pytest.mark.parametrize("statistics", ["exact", "sketch"])
def test_statistics_have_their_closed_form(comm, statistics):
    """g_k = c_k·1 in 10 dimensions: Σ‖g_k‖² = 10 Σ c_k², ‖ḡ‖² = 10 c̄²."""
    c = slopes(comm)
    model = Slope()
    optimizer = local(model, 2, scaling=hvdlocal.LocalAdaScale(statistics=statistics))
    step(optimizer, model, c[comm.rank])
    assert optimizer.grad_var is None, "they travel with the next averaging"
    step(optimizer, model, 100.0)
    if comm.size == 1:
        assert optimizer.grad_var is None
        assert optimizer.gain == 1
        return
    grad_sqr, grad_var = hvdlocal.gradient_statistics(10 * mean([x * x for x in c]), 10 * mean(c) ** 2, comm.size)
    assert optimizer.grad_var == pytest.approx(grad_var, rel=1e-5)
    assert optimizer.grad_sqr == pytest.approx(max(grad_sqr, 0), rel=1e-4, abs=1e-5)
    step(optimizer, model, c[comm.rank])
    assert optimizer.gain == pytest.approx(hvdlocal.gain_ratio(max(grad_sqr, 0), grad_var, comm.size, 2), rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("stale", [True, False])
def test_statistics_equal_brute_force_over_all_ranks(comm, stale, accumulate):
    """Three rounds on a real network; all ranks' gradients are gathered and put through Eq. 15 and the moving average."""
    period, theta = 2, 0.5
    model = small_network()
    scaling = hvdlocal.LocalAdaScale(statistics="exact", stale=stale, smoothing=theta)
    optimizer = local(
        model, period, optimizer=sgd(model, lr=0.05, momentum=0.9), scaling=scaling, accumulate=accumulate
    )
    sqr, var, weight, gains, expected = 0.0, 0.0, 0.0, [], []
    for round_ in range(3):
        for i in range(period):
            gradient = 0
            start_of_round = flat(model)
            for micro_batch in range(accumulate):
                optimizer.zero_grad()
                backward(model, seed=1000 * comm.rank + 100 * round_ + 10 * i + micro_batch)
                gradient = gradient + flat_gradient(model) / accumulate
                optimizer.step()
            gains.append(optimizer.gain)
            if i == 0:
                assert everywhere_equal(comm, start_of_round)
                everyone = torch.stack(comm.gather(gradient, "test.gradients")).double()
        if comm.size > 1:
            stats = hvdlocal.gradient_statistics(
                float(everyone.square().sum(1).mean()), float(everyone.mean(0).square().sum()), comm.size
            )
            sqr = theta * sqr + (1 - theta) * max(stats[0], 0)
            var = theta * var + (1 - theta) * max(accumulate * stats[1], 1e-6)
            weight = theta * weight + (1 - theta)
            assert optimizer.grad_sqr == pytest.approx(sqr / weight, rel=1e-4)
            assert optimizer.grad_var == pytest.approx(var / weight, rel=1e-4)
        expected.append(
            hvdlocal.gain_ratio(sqr / weight, var / weight, comm.size, period, accumulate=accumulate) if weight else 1.0
        )
    rounds = expected if not stale else [1.0, *expected[:-1]]
    assert gains == pytest.approx([gain for gain in rounds for _ in range(period)], rel=1e-4)
    assert optimizer.progress == pytest.approx(sum(gains))


@pytest.mark.parametrize("stale", [True, False])
def test_default_smoothing_counts_the_micro_batches_between_two_estimates(comm, stale):
    """Rounds of 4 steps, cut to 1 by synchronize: θ = 1 − M/1000 with M the micro-batches really consumed by all workers."""
    c = slopes(comm)
    model = Slope()
    scaling = hvdlocal.LocalAdaScale(stale=stale, statistics="exact")
    optimizer = local(model, 4, optimizer=sgd(model, lr=1e-6), scaling=scaling)
    for steps, factor in ((4, 1.0), (1, 3.0), (4, 0.0)):
        for _ in range(steps):
            step(optimizer, model, factor * c[comm.rank])
        optimizer.synchronize()
    if comm.size == 1:
        return
    variance = hvdlocal.gradient_statistics(10 * mean([x * x for x in c]), 10 * mean(c) ** 2, comm.size)[1]
    # σ² is 1, 9 and 0 (1e-6) times this variance; M before the second and third estimate:
    between = (1, 4) if stale else (4, 1)
    before = (4, *between)  # the first counts for its own round of 4, also where it is used at once
    thetas = [1 - comm.size * steps / 1000 for steps in before]
    debiased = _ema([variance, 9 * variance, 1e-6], thetas)
    assert optimizer.grad_var == pytest.approx(debiased, rel=1e-4)


def _ema(values, thetas):
    weighted = weight = 0.0
    for value, theta in zip(values, thetas, strict=True):
        weighted, weight = theta * weighted + (1 - theta) * value, theta * weight + (1 - theta)
    return weighted / weight


def test_one_local_step_with_momentum_is_data_parallelism(comm):
    """K ranks, H = 1 and SGD with momentum and weight decay equal one process with batches of K·B."""
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
    model, serial = small_network(), small_network()
    optimizer = local(model, 1, optimizer=sgd(model, **settings))
    reference = sgd(serial, **settings)
    for i in range(12):
        optimizer.zero_grad()
        backward(model, seed=100 * i + comm.rank)
        optimizer.step()
        reference.zero_grad()
        x, y = zip(*[batch(100 * i + rank) for rank in range(comm.size)], strict=True)
        torch.nn.functional.cross_entropy(serial(torch.cat(x)), torch.cat(y)).backward()
        reference.step()
    torch.testing.assert_close(flat(model), flat(serial), rtol=2e-5, atol=2e-6)
    assert everywhere_equal(comm, flat(model))


def test_ranks_end_with_the_same_bits(comm):
    model = small_network()
    optimizer = local(
        model, 3, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01), scaling=hvdlocal.LocalAdaScale()
    )
    for i in range(14):
        optimizer.zero_grad()
        backward(model, seed=100 * i + comm.rank)
        optimizer.step()
    assert comm.size == 1 or not everywhere_equal(comm, flat(model))
    optimizer.synchronize()
    assert everywhere_equal(comm, flat(model))
    assert everywhere_equal(comm, torch.tensor([optimizer.progress, optimizer.gain, optimizer.divergence]).double())


def test_budget_ends_on_an_averaging(comm):
    """S = 10 single-worker iterations, H = 4, gain 1: rounds of 4, 4 and 2 steps."""
    model = Slope()
    optimizer = local(model, 4, budget=10)
    periods = []
    while not optimizer.finished:
        step(optimizer, model, 0.1)
        if optimizer.in_sync:
            periods.append(optimizer.period)
    assert periods == [4, 4, 2]
    assert optimizer.progress == 10


def test_budget_with_a_gain_that_grows_as_the_round_shrinks(comm):
    c = slopes(comm)
    model = Slope()
    optimizer = local(model, 8, optimizer=sgd(model, lr=1e-3), scaling=hvdlocal.LocalAdaScale(smoothing=0.0), budget=30)
    steps = 0
    while not optimizer.finished:
        before = optimizer.progress
        step(optimizer, model, c[comm.rank])
        steps += 1
        assert before < 30
    assert optimizer.in_sync
    assert optimizer.progress >= 30
    if comm.size == 1:
        assert steps == 30


def test_linear_scaling_performs_the_base_number_of_epochs(comm):
    model = Slope()
    optimizer = local(model, 4, scaling=hvdlocal.LinearScaling(warmup=0.05), budget=200)
    gains = []
    while not optimizer.finished:
        step(optimizer, model, 0.0)
        gains.append(optimizer.gain)
    assert gains[0] == 1
    assert gains[-1] == comm.size
    assert len(gains) == -(-200 // comm.size), "K workers share the base run's 200 batches, the warm-up included"
    assert optimizer.progress == comm.size * len(gains)
    assert optimizer.in_sync


def test_qsr_sees_the_rate_of_the_next_round(comm):
    model = Slope()
    optimizer = local(model, hvdlocal.QSR(alpha=0.2, h_base=2), optimizer=sgd(model, lr=0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0 if i < 4 else 0.5)
    periods = []
    for _ in range(24):
        step(optimizer, model, 0.1)
        scheduler.step()
        if optimizer.in_sync:
            periods.append(optimizer.period)
    assert periods == [4, 16]


def test_rate_for_period(comm):
    """With LinearScaling the applied rate is K times the base rate, and H a K²-th of it unless the base rate is asked for."""
    for which, period in (("scaled", max(1, math.floor((4 / comm.size) ** 2))), ("base", 16)):
        model = Slope()
        optimizer = local(
            model,
            hvdlocal.QSR(alpha=0.4, h_base=1),
            optimizer=sgd(model, lr=0.1),
            scaling=hvdlocal.LinearScaling(warmup=0),
            rate_for_period=which,
        )
        step(optimizer, model, 0.0)
        assert optimizer.period == period


def test_adacomm_uses_the_mean_loss_of_all_ranks(comm):
    model = Slope(numel=1, start=1.0)
    optimizer = local(model, hvdlocal.AdaComm(4, max_period=64), optimizer=sgd(model, lr=1e-9))
    for _ in range(4):
        step(optimizer, model, 4.0 + comm.rank)
    step(optimizer, model, 1.0)
    first = mean([4.0 + rank for rank in range(comm.size)])
    assert optimizer.period == 4, "the first loss is its own reference"
    for _ in range(3):
        step(optimizer, model, 1.0 + comm.rank)
    step(optimizer, model, 1.0)
    second = mean([1.0] + 3 * [1.0 + mean(range(comm.size))])
    assert optimizer.period == math.ceil(4 * math.sqrt(second / first))


def test_adacomm_asks_for_the_loss(comm):
    model = Slope()
    optimizer = local(model, hvdlocal.AdaComm(1))
    model(1.0).backward()
    with pytest.raises(ValueError, match="record_loss"):
        optimizer.step()


def test_adacomm_after_a_warmup_from_zero(comm):
    """η₀ is the peak: while the rate rises, H is that of the loss alone; when it falls to a quarter, H doubles."""
    model = Slope(numel=1, start=1.0)
    optimizer = local(model, hvdlocal.AdaComm(4), optimizer=sgd(model, lr=1.0))
    periods = []
    for lr in (0.0, 1e-9, 2e-9, 2e-9, 0.5e-9):
        optimizer.param_groups[0]["lr"] = lr
        step(optimizer, model, 1.0)
        periods.append(optimizer.period)
        optimizer.synchronize()
    assert periods == [4, 4, 4, 4, 8]


def test_divergence_is_that_of_the_round(comm):
    """The second round starts where the first ended: the same divergence, not the sum."""
    c = slopes(comm)
    model = Slope()
    optimizer = local(model, 2)
    for _ in range(2):
        for _ in range(2):
            step(optimizer, model, c[comm.rank])
        variance = mean([(x - mean(c)) ** 2 for x in c])
        assert optimizer.divergence == pytest.approx(10 * 4 * variance, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("c", [0.0, 0.6])
def test_the_weight_of_the_bias_reaches_the_gain(comm, c):
    slope = slopes(comm)
    model = Slope()
    optimizer = local(model, 8, optimizer=sgd(model, lr=1e-6), scaling=hvdlocal.LocalAdaScale(c=c))
    for _ in range(9):
        step(optimizer, model, slope[comm.rank])
    if comm.size > 1:
        assert optimizer.gain == pytest.approx(
            hvdlocal.gain_ratio(optimizer.grad_sqr, optimizer.grad_var, comm.size, 8, c), rel=1e-6
        )


def test_the_last_round_is_as_long_as_its_own_gain_needs(comm):
    """Cutting a round makes its gain larger, so that fewer steps may do: at its gain, no step is taken past the budget."""
    c = slopes(comm)
    for budget in range(20, 40):
        model = Slope()
        scaling = hvdlocal.LocalAdaScale(smoothing=0.0)
        optimizer = local(model, 16, optimizer=sgd(model, lr=1e-6), scaling=scaling, budget=budget)
        start = 0.0
        while not optimizer.finished:
            start = optimizer.progress if optimizer.in_sync else start
            step(optimizer, model, c[comm.rank])
        assert optimizer.in_sync
        assert start + (optimizer.period - 1) * optimizer.gain < budget


def test_the_last_round_under_a_rising_gain(comm):
    """LinearScaling over half of the budget of 40: one round, in which every step counts for K while the gain rises to K."""
    model = Slope()
    optimizer = local(model, 1000, scaling=hvdlocal.LinearScaling(warmup=0.5), budget=40)
    gains = []
    while not optimizer.finished:
        step(optimizer, model, 0.0)
        gains.append(optimizer.gain)
    steps = -(-40 // comm.size)
    assert (optimizer.period, optimizer.round) == (steps, 1)
    assert gains == pytest.approx([1 + (comm.size - 1) * min(1.0, i * comm.size / 20) for i in range(steps)])


def test_budgets_that_rounding_would_stretch(comm):
    """7 epochs of 116/7 single-worker iterations are 116, although the product is a hair more."""
    model = Slope()
    optimizer = local(model, 4, budget=7 * (116 / 7) * (1 + 2e-16))
    steps = 0
    while not optimizer.finished:
        step(optimizer, model, 0.0)
        steps += 1
    assert steps == 116


def test_overflowing_statistics_are_void(comm):
    """Each rank's Σ‖g‖² fits float32, their sum does not: no estimate, rather than NaN for ever."""
    model = Slope(numel=1)
    optimizer = local(model, 1, optimizer=sgd(model, lr=0.0), scaling=hvdlocal.LocalAdaScale())
    optimizer.zero_grad()
    model(1.5e19).backward()
    optimizer.step()
    assert optimizer.grad_var is None


def test_dropped_micro_batches_leave_nothing(comm):
    model = Slope()
    optimizer = local(model, 1, accumulate=2)
    step(optimizer, model, 100.0)
    assert optimizer.micro_batches == 1
    optimizer.synchronize()
    assert optimizer.micro_batches == 0
    step(optimizer, model, 1.0)
    step(optimizer, model, 3.0)
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 3.0))


def test_synchronize_ends_the_round_early_and_only_then(comm):
    c = slopes(comm)
    model = Slope()
    optimizer = local(model, 8)
    for _ in range(3):
        step(optimizer, model, c[comm.rank])
    optimizer.synchronize()
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 5 - 3 * mean(c)))
    before, rounds = comm.traffic.bytes, optimizer.round
    optimizer.synchronize()
    assert optimizer.round == rounds
    assert comm.traffic.bytes - before == (128 if comm.size > 1 else 0)  # the 32 numbers of the digest
    assert optimizer.round == 1


def test_stop_is_agreed_at_the_next_averaging(comm):
    model = Slope()
    optimizer = local(model, 2)
    step(optimizer, model, 0.0)
    if comm.rank == comm.size - 1:
        optimizer.request_stop()
    assert not optimizer.stop_requested
    step(optimizer, model, 0.0)
    assert optimizer.stop_requested


def test_different_periods_are_found_at_the_first_averaging(comm):
    """Rank 0 sees another learning rate than the others, so it averages earlier."""
    model = Slope()
    optimizer = local(model, hvdlocal.QSR(alpha=0.2, h_base=1), optimizer=sgd(model, lr=0.1))
    optimizer.param_groups[0]["lr"] = 0.1 if comm.rank == 0 else 0.05

    def run():
        for _ in range(16):
            step(optimizer, model, 0.0)

    if comm.size == 1:
        run()
        return
    with pytest.raises(RuntimeError, match=r"the periods \[4, 16"):
        run()


def test_parameters_stay_in_place(comm):
    """The collective and the division work in place: the parameters stay where they were."""
    model = small_network()
    optimizer = local(model, 2)
    addresses = [p.data_ptr() for p in model.parameters()]
    for i in range(4):
        optimizer.zero_grad()
        backward(model, seed=i)
        optimizer.step()
    assert [p.data_ptr() for p in model.parameters()] == addresses


@pytest.mark.parametrize("statistics", ["sketch", "exact"])
def test_gradients_in_another_memory_order_count_the_same(comm, statistics):
    """Equal gradients on all ranks have no variance, also when one rank's lie in memory as channels_last."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(6, 8, 3)
    optimizer = local(model, 1, optimizer=sgd(model, lr=0.0), scaling=hvdlocal.LocalAdaScale(statistics=statistics))
    gradient = torch.randn(model.weight.shape)
    last = comm.rank == comm.size - 1
    model.weight.grad = gradient.to(memory_format=torch.channels_last) if last else gradient
    model.bias.grad = torch.zeros_like(model.bias)
    optimizer.step()
    if comm.size > 1:
        assert optimizer.grad_var < 1e-4
        assert optimizer.grad_sqr == pytest.approx(float(gradient.square().sum()), rel=1e-4)


def test_a_default_dtype_of_float64_changes_nothing(comm):
    torch.set_default_dtype(torch.float64)
    try:
        model = torch.nn.Linear(40, 50).float()
        optimizer = local(model, 1, optimizer=sgd(model), scaling=hvdlocal.LocalAdaScale(sketch_size=512))
        model(torch.ones(2, 40, dtype=torch.float32)).sum().backward()
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert comm.size == 1 or optimizer.grad_sqr > 0
