"""LocalOptimizer whose workers are islands: the mean gradient inside at every step, the average across at the end of a round."""

import copy
import math
import warnings

import pytest
import torch
from support.islands import island_of, means, odd, with_islands
from support.models import Slope, backward, everywhere_equal, flat, flat_gradient, local, mean, sgd, small_network, step

import hvdlocal
from hvdlocal import SynchronousOptimizer
from hvdlocal.averaging.rounds import plan_rounds


def train(optimizer, model, steps, first=0):
    for i in range(first, first + steps):
        optimizer.zero_grad()
        optimizer.record_loss(backward(model, seed=100 * i + optimizer.communicator.rank))
        optimizer.step()


def test_an_island_steps_on_its_mean_gradient_and_the_islands_average(layout):
    comm = layout
    model = Slope(start=0.0)
    optimizer = local(model, 2, communicator=comm)
    mine = means(comm)[island_of(comm)]
    step(optimizer, model, odd(comm)[comm.rank])
    assert torch.equal(model.w.detach(), torch.full((10,), -mine))  # −2 and −6 on 2 × 2 ranks
    step(optimizer, model, odd(comm)[comm.rank])
    # 2 × 2 ranks with the gradients 1, 3 | 5, 7: the islands go to −4 and −12, whose mean is −8.
    torch.testing.assert_close(model.w.detach(), torch.full((10,), -2 * mean(means(comm))))
    assert everywhere_equal(comm, model.w.detach())
    variance = mean([(m - mean(means(comm))) ** 2 for m in means(comm)])
    assert optimizer.divergence == pytest.approx(10 * 2**2 * variance, rel=1e-5, abs=1e-5)
    assert (optimizer.num_workers, optimizer.accumulate, optimizer.round) == (comm.num_islands, 1, 1)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("kind", "stale"), [("exact", True), ("exact", False), ("sketch", True)])
def test_statistics_are_those_of_the_gradients_of_all_ranks(layout, kind, stale, accumulate):
    comm = layout
    model = Slope(numel=1, start=0.0)
    scaling = hvdlocal.LocalAdaScale(stale=stale, statistics=kind, smoothing=0.0)
    inner = sgd(model, lr=1e-3)
    optimizer = local(model, 2, optimizer=inner, scaling=scaling, accumulate=accumulate, communicator=comm)
    for _ in range(3 * accumulate):
        step(optimizer, model, odd(comm)[comm.rank])
    c = odd(comm)
    # 2 × 2 ranks: mean ‖g‖² = 21, ‖ḡ‖² = 16, σ² = 20/3, G = 43/3.
    grad_sqr, grad_var = hvdlocal.gradient_statistics(mean([x * x for x in c]), mean(c) ** 2, comm.size)
    if (comm.size, comm.island_size) == (4, 2):
        assert (grad_sqr, grad_var) == (pytest.approx(43 / 3), pytest.approx(20 / 3))
    grad_var *= accumulate  # of one micro-batch, when the mean of so many has that variance
    assert optimizer.grad_sqr == pytest.approx(grad_sqr, rel=1e-5)
    assert optimizer.grad_var == pytest.approx(grad_var, rel=1e-5)
    per_step = accumulate * comm.island_size
    gain = hvdlocal.gain_ratio(grad_sqr, grad_var, comm.num_islands, 2, accumulate=per_step)
    assert optimizer.gain == pytest.approx(gain, rel=1e-5)
    if (comm.size, comm.island_size, accumulate) == (4, 2, 1):
        assert optimizer.gain == pytest.approx(1.167209, rel=1e-5)


@pytest.mark.parametrize("stale", [True, False])
def test_the_moving_averages_count_the_micro_batches_of_all_ranks(layout, stale):
    """Variances v and 9v in rounds of two steps of two micro-batches: b = θ(1 − θ)v + (1 − θ)9v, divided by 1 − θ²."""
    comm = layout
    model = Slope(numel=1, start=0.0)
    scaling = hvdlocal.LocalAdaScale(stale=stale, statistics="exact")
    optimizer = local(model, 2, optimizer=sgd(model, lr=1e-3), scaling=scaling, accumulate=2, communicator=comm)
    for factor in (1, 3):
        for _ in range(4):
            step(optimizer, model, factor * odd(comm)[comm.rank])
    c = odd(comm)
    variance = 2 * hvdlocal.gradient_statistics(mean([x * x for x in c]), mean(c) ** 2, comm.size)[1]
    theta = 1 - 4 * comm.size / 1000
    assert optimizer.grad_var == pytest.approx(variance * (theta + 9) / (1 + theta), rel=1e-5)


def test_a_micro_batch_without_a_gradient_gives_no_estimate(layout):
    comm = layout
    model = Slope(numel=1, start=0.0)
    optimizer = local(model, 1, scaling=hvdlocal.LocalAdaScale(), accumulate=2, communicator=comm)
    for empty in (True, False):
        for micro_batch in range(2):
            optimizer.zero_grad()
            if not (empty and micro_batch == 0 and comm.rank == comm.size - 1):
                model(odd(comm)[comm.rank]).backward()
            optimizer.step()
        assert (optimizer.grad_var is None) == empty


def test_a_period_of_one_is_data_parallelism(layout):
    ours, theirs = small_network(), small_network()
    optimizer = local(ours, 1, optimizer=sgd(ours, lr=0.05), communicator=layout)
    baseline = SynchronousOptimizer(sgd(theirs, lr=0.05), theirs, communicator=layout)
    for _ in range(5):
        train(optimizer, ours, 1)
        train(baseline, theirs, 1)
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("momentum", ["local", "average", "reset"])
def test_it_is_local_sgd_of_as_many_workers_with_larger_batches(layout, momentum, accumulate):
    """A serial simulation of M workers, each with the micro-batches of its n ranks."""
    comm, n, lr, beta = layout, layout.island_size, 0.05, 0.9
    model = small_network()
    optimizer = local(
        model,
        2,
        optimizer=sgd(model, lr=lr, momentum=beta),
        momentum=momentum,
        accumulate=accumulate,
        communicator=comm,
    )
    workers = [small_network() for _ in range(comm.num_islands)]
    velocities = [torch.zeros_like(flat(model)) for _ in workers]
    calls = 0
    for _ in range(3):
        for _ in range(2):
            micro_batches = range(calls, calls + accumulate)
            train(optimizer, model, accumulate, first=calls)
            calls += accumulate
            for m, worker in enumerate(workers):
                worker.zero_grad()
                for i in micro_batches:
                    for rank in range(m * n, (m + 1) * n):
                        backward(worker, seed=100 * i + rank)
                velocities[m] = beta * velocities[m] + flat_gradient(worker) / (n * accumulate)
                assign(worker, flat(worker) - lr * velocities[m])
        average = torch.stack([flat(worker) for worker in workers]).mean(0)
        for worker in workers:
            assign(worker, average)
        if momentum == "average":
            velocities = [torch.stack(velocities).mean(0)] * len(workers)
        if momentum == "reset":
            velocities = [torch.zeros_like(velocity) for velocity in velocities]
        torch.testing.assert_close(flat(model), average, rtol=1e-5, atol=1e-6)
    assert optimizer.round == 3


def assign(model, values):
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(values, model.parameters())


def test_replicas_of_an_island_hold_the_same_bits_at_every_step(islands):
    comm = islands
    model = small_network()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaling = hvdlocal.LocalAdaScale()
    optimizer = local(model, 4, optimizer=adamw, scaling=scaling, max_norm=0.5, communicator=comm)
    for i in range(10):
        train(optimizer, model, 1, first=i)
        replicas = comm.gather(flat(model).numpy().tobytes(), "test.replicas")
        for m in range(comm.num_islands):
            assert len(set(replicas[m * comm.island_size : (m + 1) * comm.island_size])) == 1
        assert len(set(replicas)) == (1 if optimizer.in_sync or comm.num_islands == 1 else comm.num_islands)


def test_messages_across_the_islands_are_slices_and_there_is_one_a_round(islands):
    comm = islands
    model = Slope(numel=10_000, start=0.0)
    optimizer = local(model, 4, communicator=comm)
    all_ranks, inside, across = (copy.copy(one.traffic) for one in (comm, comm.island, comm.peers))
    for _ in range(8):
        step(optimizer, model, 1.0)
    collectives = comm.island.traffic.collectives - inside.collectives
    assert comm.traffic == all_ranks, "nothing over all ranks"
    # Inside: the gradient of every step; in a round the sum of what is each rank's own, and the slices.
    assert collectives == 8 + 2 * (2 if comm.num_islands > 1 else 1)
    moved = comm.island.traffic.bytes - inside.bytes
    assert 40_000 * (8 + 2 * (comm.num_islands > 1)) <= moved <= 41_000 * 10
    if comm.num_islands > 1:
        assert comm.peers.traffic.collectives - across.collectives == 2
        sent = (comm.peers.traffic.bytes - across.bytes) / 2
        assert 40_000 / comm.island_size <= sent <= 41_000 / comm.island_size


@pytest.mark.parametrize("policy", ["average", "local"])
def test_buffers_differ_between_the_ranks_of_an_island_and_are_averaged_over_all(islands, policy):
    comm = islands
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.BatchNorm1d(1, momentum=1.0, affine=False), torch.nn.Linear(1, 1)
    )
    optimizer = local(model, 2, buffers=policy, communicator=comm)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.tensor([[comm.rank], [comm.rank + 2.0]])).sum().backward()
        optimizer.step()
    expected = mean([rank + 1.0 for rank in range(comm.size)]) if policy == "average" else comm.rank + 1.0
    assert float(model[1].running_mean) == pytest.approx(expected)
    assert everywhere_equal(comm, flat(model))


def test_an_island_with_a_replica_that_is_not_finite_is_left_out_as_a_whole(islands):
    comm = islands
    model = Slope(numel=1000, start=0.0)
    optimizer = local(model, 2, communicator=comm)
    step(optimizer, model, odd(comm)[comm.rank])
    with pytest.raises(hvdlocal.NonFiniteError) as caught:
        step(optimizer, model, math.nan if comm.rank == comm.size - 1 else odd(comm)[comm.rank])
    if comm.num_islands == 1:
        assert "no rank holds a usable model" in str(caught.value)
        return
    first = comm.size - comm.island_size
    assert f"ranks {', '.join(map(str, range(first, comm.size)))} of {comm.size}" in str(caught.value)
    others = means(comm)[:-1]
    torch.testing.assert_close(model.w.detach(), torch.full((1000,), -2 * mean(others)))
    for _ in range(2):
        step(optimizer, model, 1.0)
    torch.testing.assert_close(model.w.detach(), torch.full((1000,), -2 * mean(others) - 2))


def test_a_loss_that_is_not_finite_on_one_rank_takes_its_island_out(islands):
    comm = islands
    model = Slope(numel=1000, start=0.0)  # so that every rank has parameters in its slice
    optimizer = local(model, 1, communicator=comm)
    optimizer.zero_grad()
    model(odd(comm)[comm.rank]).backward()
    optimizer.record_loss(math.nan if comm.rank == 0 else 1.0)
    with pytest.raises(hvdlocal.NonFiniteError):
        optimizer.step()
    if comm.num_islands > 1:
        torch.testing.assert_close(model.w.detach(), torch.full((1000,), -mean(means(comm)[1:])))
        healthy = means(comm)[1:]
        variance = mean([(m - mean(healthy)) ** 2 for m in healthy])
        assert optimizer.divergence == pytest.approx(1000 * variance, rel=1e-4, abs=1e-3)


def test_nonfinite_buffers_of_one_rank_leave_the_others_in_the_mean(islands):
    comm = islands
    model = torch.nn.BatchNorm1d(1)
    optimizer = local(model, 1, communicator=comm)
    model.running_mean.fill_(math.nan if comm.rank == 0 else 4.0 * comm.rank)
    model.weight.grad = torch.zeros_like(model.weight)
    with pytest.raises(hvdlocal.NonFiniteError, match="'running_mean' on rank 0"):
        optimizer.step()
    assert float(model.running_mean) == pytest.approx(mean([4.0 * rank for rank in range(1, comm.size)]))


@pytest.mark.parametrize("interrupt", [1, 3, 4, 6])
@pytest.mark.parametrize("island_period", [1, 2])
def test_resumption_inside_a_round_is_bit_identical(islands, interrupt, island_period):
    def make(model):
        scaling = hvdlocal.LocalAdaScale() if island_period == 1 else None
        inner = sgd(model, lr=0.05, momentum=0.9)
        return local(
            model, 4, optimizer=inner, scaling=scaling, island_period=island_period, accumulate=2, communicator=islands
        )

    whole, part, rest = small_network(), small_network(), small_network(seed=1)
    uninterrupted, before, after = make(whole), make(part), make(rest)
    train(uninterrupted, whole, 12)
    train(before, part, interrupt)
    state = {"model": {k: v.clone() for k, v in part.state_dict().items()}, "optimizer": before.state_dict()}
    rest.load_state_dict(state["model"])
    after.load_state_dict(state["optimizer"])
    train(after, rest, 12 - interrupt, first=interrupt)
    assert torch.equal(flat(rest), flat(whole))
    for name in ("progress", "gain", "period", "round", "steps_in_round", "grad_sqr", "grad_var", "divergence", "loss"):
        assert getattr(after, name) == getattr(uninterrupted, name), name


@pytest.mark.parametrize("others", ["none", "of other ranks"])
def test_a_state_inside_a_round_belongs_to_its_island(islands, others):
    comm, other = islands, copy.copy(with_islands(islands, 1))
    if others == "of other ranks":
        other.island, other.peers = comm.peers, comm.island
    model = Slope()
    optimizer = local(model, 2, communicator=comm)
    step(optimizer, model, 1.0)
    elsewhere = local(Slope(), 2, communicator=other)
    with pytest.raises(ValueError, match=r"the ranks \[.*\] were one worker, and cannot be continued where the ranks"):
        elsewhere.load_state_dict(optimizer.state_dict())
    optimizer.synchronize()
    elsewhere.load_state_dict(optimizer.state_dict())
    assert elsewhere.progress == 1


def test_an_overflow_on_one_rank_skips_the_step_of_its_island(islands):
    comm = islands
    model = Slope(start=0.0)
    optimizer = local(model, 2, communicator=comm)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i in range(2):
        optimizer.zero_grad()
        overflow = i == 0 and comm.rank == 0
        scaler.scale(model(math.inf if overflow else odd(comm)[comm.rank])).backward()
        scaler.step(optimizer)
        scaler.update()
    steps = [1 if m == 0 else 2 for m in range(comm.num_islands)]
    expected = mean([-count * m for count, m in zip(steps, means(comm), strict=True)])
    torch.testing.assert_close(model.w.detach(), torch.full((10,), expected))


def test_synchronize_forgets_the_overflow_of_a_micro_batch_that_it_drops(layout):
    comm = layout
    model = Slope(start=0.0)
    optimizer = local(model, 1, accumulate=2, communicator=comm)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i in range(3):
        optimizer.zero_grad()
        scaler.scale(model(math.inf if i == 0 and comm.rank == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if i == 0:
            optimizer.synchronize()
    torch.testing.assert_close(model.w.detach(), torch.full((10,), -1.0))


def test_parameters_averaged_inside_an_island_every_few_steps(islands):
    """Hierarchical local SGD: each rank steps on its own gradient, which is constant here."""
    comm = islands
    model = Slope(start=0.0)
    optimizer = local(model, 5, island_period=2, communicator=comm)
    mine, own = means(comm)[island_of(comm)], odd(comm)[comm.rank]
    for expected in (-own, -2 * mine, -2 * mine - own, -4 * mine, -5 * mean(means(comm))):
        step(optimizer, model, own)
        torch.testing.assert_close(model.w.detach(), torch.full((10,), expected))
    assert everywhere_equal(comm, model.w.detach())
    across = mean([25 * 10 * (m - mean(means(comm))) ** 2 for m in means(comm)])
    inside = mean([10 * (c - means(comm)[rank // comm.island_size]) ** 2 for rank, c in enumerate(odd(comm))])
    # The last step of the round was each rank's own: replicas differ by 4 steps of the islands and one step of the ranks.
    last = [-4 * means(comm)[rank // comm.island_size] - c for rank, c in enumerate(odd(comm))]
    assert optimizer.divergence == pytest.approx(10 * mean([(w - mean(last)) ** 2 for w in last]), rel=1e-4)
    assert across + inside > 0


def test_moments_averaged_inside_an_island_every_few_steps(islands):
    """Velocities 1, 1.5 of the own gradient, then their mean: the third step moves by 0.75 of the mean and the own gradient."""
    comm = islands
    model = Slope(start=0.0)
    inner = sgd(model, momentum=0.5)
    optimizer = local(model, 5, optimizer=inner, momentum="average", island_period=2, communicator=comm)
    mine, own = means(comm)[island_of(comm)], odd(comm)[comm.rank]
    for expected in (-own, -2.5 * mine, -3.25 * mine - own):
        step(optimizer, model, own)
        torch.testing.assert_close(model.w.detach(), torch.full((10,), expected))


def test_linear_scaling_counts_all_ranks(layout):
    comm = layout
    model = Slope(start=0.0)
    optimizer = local(model, 1, scaling=hvdlocal.LinearScaling(warmup=0), accumulate=2, communicator=comm)
    for _ in range(2):
        step(optimizer, model, 1.0)
    assert optimizer.gain == 2 * comm.size
    assert optimizer.progress == 2 * comm.size


def test_arguments_that_have_no_meaning_are_refused(islands, comm):
    with pytest.raises(ValueError, match=r"island_period=2 without islands: give hvdlocal.init\(island=…\)"):
        local(Slope(), 2, island_period=2, communicator=with_islands(comm, 1))
    with pytest.raises(ValueError, match="island_period=2 with LocalAdaScale: no gain is derived"):
        local(Slope(), 2, island_period=2, scaling=hvdlocal.LocalAdaScale(), communicator=islands)
    for value in (0, 1.5, "2"):
        with pytest.raises(ValueError, match=r"island_period=.*: must be a whole number of at least 1"):
            local(Slope(), 2, island_period=value, communicator=islands)


def test_learning_rates_that_differ_inside_an_island_are_found_at_the_step(islands):
    comm = islands
    model = Slope()
    optimizer = local(model, 8, communicator=comm)
    step(optimizer, model, 1.0)
    if comm.island.rank == 1:
        optimizer.param_groups[0]["lr"] = 0.5
    odd_one = comm.rank - comm.island.rank + 1
    told = f"Rank {odd_one} of {comm.size} .learning rate of group 0 0.5, not 1.0"
    with pytest.raises(hvdlocal.DisagreementError, match=told):
        step(optimizer, model, 1.0)


def test_replicas_that_differ_inside_an_island_are_found_at_the_step(islands):
    comm = islands
    model = Slope()
    optimizer = local(model, 8, communicator=comm)
    step(optimizer, model, 1.0)
    if comm.island.rank == 1:
        with torch.no_grad():
            model.w.mul_(2)
    with pytest.raises(hvdlocal.DisagreementError, match="the parameters differ where they must be equal"):
        step(optimizer, model, 1.0)


def test_synchronize_ends_the_round_of_all_islands(islands):
    comm = islands
    model = Slope(start=0.0)
    optimizer = local(model, 8, communicator=comm)
    step(optimizer, model, odd(comm)[comm.rank])
    optimizer.synchronize()
    torch.testing.assert_close(model.w.detach(), torch.full((10,), -mean(odd(comm))))
    assert (optimizer.round, optimizer.steps_in_round, optimizer.in_sync) == (1, 0, True)
    optimizer.synchronize()
    if comm.rank == 0:
        with torch.no_grad():
            model.w.add_(1)
    with pytest.raises(hvdlocal.DisagreementError, match="the parameters differ"):
        optimizer.synchronize()


def test_a_parameter_without_a_gradient_on_some_ranks_counts_as_zero(islands):
    comm = islands
    model = torch.nn.ModuleList([Slope(start=0.0), Slope(start=0.0)])
    optimizer = local(model, 1, communicator=comm)
    optimizer.zero_grad()
    (model[0](1.0) + (model[1](float(comm.size)) if comm.rank == 0 else 0)).backward()
    optimizer.step()
    torch.testing.assert_close(model[0].w.detach(), torch.full((10,), -1.0))
    torch.testing.assert_close(model[1].w.detach(), torch.full((10,), -1.0))


def test_a_layer_that_is_frozen_later_stays_where_it_is(layout):
    comm = layout
    model = torch.nn.ModuleList([Slope(start=0.0), Slope(start=0.0)])
    optimizer = local(model, 3, optimizer=sgd(model, momentum=0.5), communicator=comm)
    for i in range(3):
        model[1].requires_grad_(i == 0)
        optimizer.zero_grad()
        (model[0](1.0) + model[1](1.0)).backward()
        optimizer.step()
    torch.testing.assert_close(model[0].w.detach(), torch.full((10,), -1 - 1.5 - 1.75))
    torch.testing.assert_close(model[1].w.detach(), torch.full((10,), -1.0))


def test_the_rounds_are_those_of_a_plan_with_islands(layout):
    comm = layout
    rule, schedule = hvdlocal.PostLocal(switch=6, period=3), (lambda progress: 0.1)
    model = Slope(numel=1, start=0.0)
    scaling = hvdlocal.LinearScaling(warmup=0.5)
    budget = 12.0 * comm.size
    optimizer = local(model, rule, optimizer=sgd(model, lr=0.1), scaling=scaling, budget=budget, communicator=comm)
    planned = plan_rounds(rule, schedule, budget, scaling, num_workers=comm.num_islands, accumulate=comm.island_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for round_ in planned:
            for _ in range(round_.period):
                assert not optimizer.finished
                step(optimizer, model, 1.0)
            assert (optimizer.period, optimizer.steps_in_round) == (round_.period, 0)
            assert optimizer.progress == pytest.approx(round_.end)
    assert optimizer.finished


class Layers(torch.nn.Module):
    """Three parameters of 1.6 MB each, whose gradients arrive one after the other, from the last to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Slope(numel=400_000, start=0.0) for _ in range(3)])

    def forward(self, c: float) -> torch.Tensor:
        return sum(layer(c) for layer in self.layers)


@pytest.mark.parametrize("stale", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_sums_of_an_island_begin_during_the_backward_pass(islands, monkeypatch, accumulate, stale):
    comm = islands
    monkeypatch.setattr("hvdlocal.averaging.island_gradient.BUCKET_BYTES", 2_000_000)
    model = Layers()
    scaling = hvdlocal.LocalAdaScale(stale=stale, smoothing=0.0)
    optimizer = local(
        model, 2, optimizer=sgd(model, lr=1e-3), scaling=scaling, accumulate=accumulate, communicator=comm
    )
    expected = torch.zeros(10)
    for i in range(6 * accumulate):
        before = comm.island.traffic.collectives
        optimizer.zero_grad()
        # The last layer's gradient is late on one rank in one step: its sum begins in step() there.
        late = i == 5 * accumulate - 1 and comm.rank == 1
        loss = sum(layer(odd(comm)[comm.rank]) for layer in model.layers[: 2 if late else 3])
        loss.backward()
        begun = comm.island.traffic.collectives - before
        last_micro_batch = i % accumulate == accumulate - 1
        assert begun == (2 if last_micro_batch and i >= accumulate and not late else 0), i
        optimizer.step()
        if last_micro_batch:
            expected -= 1e-3 * optimizer.gain * means(comm)[island_of(comm)]
        if optimizer.in_sync and last_micro_batch:
            expected = torch.full((10,), mean(comm.gather(float(expected[0]), "test.expected")))
        torch.testing.assert_close(model.layers[0].w.detach()[:10], expected)


def test_synchronize_ends_the_sums_of_a_backward_pass_without_a_step(islands, monkeypatch):
    """On one rank only, whose sums no other rank would come to."""
    comm = islands
    monkeypatch.setattr("hvdlocal.averaging.island_gradient.BUCKET_BYTES", 2_000_000)
    model = Layers()
    optimizer = local(model, 2, optimizer=sgd(model, lr=1e-3), communicator=comm)
    for _ in range(2):
        for _ in range(2):
            step(optimizer, model, odd(comm)[comm.rank])
        if comm.rank == 0:
            model(100.0).backward()
        optimizer.synchronize()
    torch.testing.assert_close(flat(model), torch.full((1_200_000,), -4e-3 * mean(odd(comm))))


def test_layers_whose_ranks_change_their_weights_in_the_forward_pass_are_refused(islands):
    embedding = torch.nn.Embedding(4, 2, max_norm=1.0)
    with pytest.raises(ValueError, match="has a max_norm, with which every rank rescales the rows"):
        local(embedding, 2, communicator=islands)
    local(torch.nn.Embedding(4, 2, max_norm=1.0), 2, island_period=2, communicator=islands)
    with pytest.raises(ValueError, match=f"sparse gradients, but island={islands.island_size} needs dense ones"):
        local(torch.nn.Embedding(4, 2, sparse=True), 2, communicator=islands)


def test_one_island_of_all_ranks_is_data_parallelism_and_is_told(comm):
    if comm.size == 1:
        pytest.skip("one rank is no island")
    model = Slope(start=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = local(model, 3, communicator=with_islands(comm, comm.size))
    told = [str(one.message) for one in caught if "form one island" in str(one.message)]
    assert len(told) == (comm.rank == 0)
    step(optimizer, model, odd(comm)[comm.rank])
    torch.testing.assert_close(model.w.detach(), torch.full((10,), -mean(odd(comm))))
    assert (optimizer.num_workers, optimizer.steps_in_round) == (1, 1)


def test_one_island_that_averages_parameters_is_not_told_of_data_parallelism(comm, recwarn):
    if comm.size == 1:
        pytest.skip("one rank is no island")
    model = Slope(start=0.0)
    optimizer = local(model, 4, island_period=2, communicator=with_islands(comm, comm.size))
    assert not recwarn.list
    own, everyone = odd(comm)[comm.rank], mean(odd(comm))
    for expected in (-own, -2 * everyone, -2 * everyone - own, -4 * everyone):
        step(optimizer, model, own)
        torch.testing.assert_close(model.w.detach(), torch.full((10,), expected))
