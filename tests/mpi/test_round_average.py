"""An average is begun, finished and applied: what is done with the mean can be exchanged, and training can go on meanwhile."""

import copy

import pytest
import torch
from support.models import Slope, everywhere_equal, local, sgd, step

import hvdlocal
from hvdlocal.averaging.apply import ApplyMean


def slope_of(comm) -> float:
    """A different gradient on every rank, 1 and 3 on two; their mean is 2."""
    return 2 * (1 + 2 * comm.rank) / comm.size


class Nesterov(ApplyMean):
    """A torch optimizer steps on how far the mean has moved since the round began, as in DiLoCo."""

    def __init__(self, replica):
        self._replica = replica
        self._begin = torch.nn.Parameter(replica.parameters.clone())
        self._outer = torch.optim.SGD([self._begin], lr=0.7, momentum=0.9, nesterov=True)

    def begin_round(self):
        self._begin.copy_(self._replica.parameters)

    def message(self):
        return self._replica

    def apply(self, mean, *, contributed):
        self._begin.grad = self._begin - mean.parameters
        self._outer.step()
        self._replica.parameters.copy_(self._begin)

    def shared_state(self):
        return copy.deepcopy({"begin": self._begin.data, "outer": self._outer.state_dict()})

    def load_shared_state(self, parts):
        [state] = parts
        self._begin.data.copy_(state["begin"])
        self._outer.load_state_dict(state["outer"])


class Carried(ApplyMean):
    """The mean of what was sent, moved by the steps that were taken since, as in CoCoD-SGD."""

    def __init__(self, replica):
        self._replica = replica
        self._message = replica.zeros_like()
        self._sent = torch.zeros_like(replica.replica)

    def message(self):
        self._message.flat.copy_(self._replica.flat)
        self._sent.copy_(self._replica.replica)
        return self._message

    def apply(self, mean, *, contributed):
        self._replica.replica.sub_(self._sent).add_(mean.replica)


class Overlapping(hvdlocal.LocalOptimizer):
    """Applies each mean one step later."""

    def __init__(self, model, period, **settings):
        super().__init__(sgd(model), model, period=hvdlocal.ConstantPeriod(period), **settings)
        self._mean = Carried(self._flat_replica)

    def _end_round(self):
        self.finish_average()
        self._begin_average()
        self._round += 1
        self._steps_in_round = 0

    def _take_gradient(self):
        super()._take_gradient()
        if self._steps_in_round == 1:
            self.finish_average()

    @torch.no_grad()
    def finish_average(self):
        if self._round_average.pending:
            self._use_average(self._round_average.finish())

    def synchronize(self):
        self.finish_average()
        super().synchronize()
        self.finish_average()


def test_by_default_the_mean_takes_the_place_of_the_replica_in_one_collective_without_a_copy(comm):
    model = Slope(start=0.0)
    optimizer = local(model, 2)
    place = model.w.data_ptr()
    before = comm.traffic.collectives
    for _ in range(4):
        step(optimizer, model, slope_of(comm))
    assert model.w.tolist() == pytest.approx([-8.0] * 10)
    assert model.w.data_ptr() == place
    assert comm.traffic.collectives - before == (2 if comm.size > 1 else 0)
    assert optimizer.shared_state() == {}
    optimizer.load_shared_state([{}])
    with pytest.raises(ValueError, match="the state holds begin of an outer optimizer, and this run averages without"):
        optimizer.load_shared_state([{"begin": 1}])


class Halfway(ApplyMean):
    """Goes half of the way from where the round began to the mean."""

    def __init__(self, replica):
        self._replica = replica
        self._begin = torch.full_like(replica.parameters, torch.nan)

    def begin_round(self):
        self._begin.copy_(self._replica.parameters)

    def message(self):
        return self._replica

    def apply(self, mean, *, contributed):
        self._replica.parameters.lerp_(self._begin, 0.5)


def test_a_round_begins_where_the_loop_has_put_the_model(comm):
    """0 goes to −4 and half of the way is −2; from 10 it goes to 6, and half of the way is 8."""
    model = Slope(start=0.0)
    optimizer = local(model, 2)
    optimizer._mean = Halfway(optimizer._flat_replica)
    for start, end in ((0.0, -2.0), (10.0, 8.0)):
        with torch.no_grad():
            model.w.fill_(start)
        for _ in range(2):
            step(optimizer, model, slope_of(comm))
        assert model.w.tolist() == pytest.approx([end] * 10)


def test_what_is_done_with_the_mean_can_be_exchanged(comm):
    model = Slope(start=0.0)
    optimizer = local(model, 2)
    optimizer._mean = Nesterov(optimizer._flat_replica)
    for expected in (-5.32, -12.908):
        for _ in range(2):
            step(optimizer, model, slope_of(comm))
        assert model.w.tolist() == pytest.approx([expected] * 10)
        assert everywhere_equal(comm, model.w.detach())
        assert optimizer.in_sync


@pytest.mark.parametrize("steps", [2, 3], ids=["between two rounds", "inside a round"])
def test_the_shared_state_continues_a_run(comm, steps):
    def make():
        model = Slope(start=0.0)
        optimizer = local(model, 2)
        optimizer._mean = Nesterov(optimizer._flat_replica)
        return model, optimizer

    whole, before = make()
    for _ in range(steps):
        step(before, whole, slope_of(comm))
    model, after = make()
    model.load_state_dict(whole.state_dict())
    after.load_shared_state([before.shared_state()])
    after.load_state_dict(before.state_dict())
    for _ in range(4 - steps):
        step(before, whole, slope_of(comm))
        step(after, model, slope_of(comm))
    assert torch.equal(model.w, whole.w)
    assert model.w.tolist() == pytest.approx([-12.908] * 10)


def test_averaged_replicas_of_a_checkpoint_are_applied_like_a_mean(comm):
    """As on another number of ranks: the model that was loaded is the mean of a round that was under way."""
    model = Slope(start=0.0)
    optimizer = local(model, 2)
    optimizer._mean = Nesterov(optimizer._flat_replica)
    step(optimizer, model, slope_of(comm))
    shared, state = optimizer.shared_state(), optimizer.state_dict()
    model.w.data.fill_(-2.0)
    optimizer.load_shared_state([shared])
    optimizer.load_averaged_state_dict(state, progress=1.0)
    assert model.w.tolist() == pytest.approx([-2.66] * 10)  # 0.7 · 1.9 · 2
    assert optimizer.in_sync


@pytest.mark.parametrize("scaling", [None, "stale", "exact"])
def test_training_goes_on_while_the_collective_runs(comm, scaling):
    rule = {"stale": hvdlocal.LocalAdaScale(c=0.0), "exact": hvdlocal.LocalAdaScale(c=0.0, statistics="exact")}
    model = Slope(start=0.0)
    optimizer = Overlapping(model, 2, scaling=rule.get(scaling))
    mine, expected = slope_of(comm), []
    for number in range(1, 7):
        step(optimizer, model, mine)
        expected.append(optimizer.gain)
        assert optimizer.round_under_way == (number % 2 == 1)
        assert not optimizer.in_sync, "a replica that has gone on, or a mean that is still to come"
        assert optimizer.round == number // 2
        if number == 3 and scaling is None:
            assert model.w.tolist() == pytest.approx([-4 - mine] * 10)
        if number == 5 and scaling is None:
            assert model.w.tolist() == pytest.approx([-8 - mine] * 10)
    optimizer.synchronize()
    assert optimizer.in_sync
    assert everywhere_equal(comm, model.w.detach())
    assert model.w.tolist() == pytest.approx([-2 * sum(expected)] * 10, rel=1e-5)
    assert (optimizer.grad_sqr is not None) == (scaling is not None and comm.size > 1)


def test_an_average_that_was_begun_leaves_the_model_free(comm):
    """The collective runs on memory of its own while forward and backward passes, and a whole step, use the model."""
    model = Slope(numel=1_000_000, start=0.0)
    optimizer = Overlapping(model, 4)
    for _ in range(4):
        step(optimizer, model, slope_of(comm))
    assert optimizer._round_average.pending
    assert model(1.0).item() == pytest.approx(-4 * slope_of(comm) * 1_000_000, rel=1e-4)
    step(optimizer, model, slope_of(comm))
    assert not optimizer._round_average.pending
    assert model.w[:3].tolist() == pytest.approx([-8 - slope_of(comm)] * 3)
