"""What must be equal on all ranks is compared in the collectives that happen anyway: a difference names ranks and kind."""

import warnings

import pytest
import torch
from support.models import Slope, local, mean, sgd, slopes, step

import hvdlocal


def synchronous(model, **settings):
    return hvdlocal.SynchronousOptimizer(sgd(model), model, **settings)


BOTH = pytest.mark.parametrize("wrap", [lambda model: local(model, 2), synchronous], ids=["local", "synchronous"])


def expect(comm, message):
    """An error on every rank, where there is more than one."""
    return pytest.raises(hvdlocal.DisagreementError, match=message)


@BOTH
def test_equal_ranks_are_left_alone(comm, wrap):
    model = torch.nn.ModuleDict(
        {"slope": Slope(100), "frozen": Slope().requires_grad_(False), "norm": torch.nn.BatchNorm1d(3)}
    )
    model.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
    optimizer = wrap(model)
    for lr in (1.0, 0.5, 0.25, 0.125):
        optimizer.param_groups[0]["lr"] = lr
        step(optimizer, model["slope"], slopes(comm)[comm.rank])
        model.pointer += 1
        optimizer.synchronize()
    assert optimizer.in_sync


@BOTH
def test_a_learning_rate_of_ones_own(comm, wrap):
    """What ReduceLROnPlateau does on the losses of each rank."""
    model = Slope()
    optimizer = wrap(model)
    for _ in range(2):
        step(optimizer, model, 1.0)
    last = comm.size - 1
    if comm.size == 1:
        return
    if comm.rank == last:
        optimizer.param_groups[0]["lr"] = 0.1
    with expect(comm, rf"Rank {last} of {comm.size} \(learning rate of group 0 0.1, not 1.0\).*ReduceLROnPlateau"):
        for _ in range(2):
            step(optimizer, model, 1.0)


@BOTH
def test_a_checkpoint_loaded_on_one_rank(comm, wrap):
    model = Slope(1000)
    optimizer = wrap(model)
    if comm.size == 1:
        return
    if comm.rank == 0:
        model.load_state_dict({"w": torch.zeros(1000)})
    with expect(comm, "parameters differ where they must be equal"):
        for _ in range(2):
            step(optimizer, model, 1.0)


@BOTH
def test_a_checkpoint_loaded_on_one_rank_is_found_before_an_evaluation(comm, wrap):
    model = torch.nn.Sequential(*[Slope() for _ in range(9)])
    optimizer = wrap(model)
    if comm.size == 1:
        return
    if comm.rank == 0:
        model[8].load_state_dict({"w": torch.zeros(10)})  # one tensor of many: synchronize looks at all
    with expect(comm, "parameters differ where they must be equal"):
        optimizer.synchronize()


def test_the_same_checkpoint_on_all_ranks_is_no_difference(comm):
    """And the round's divergence is measured from it: (1/K) Σ ‖w_k − w̄‖² = n H² Var c at learning rate 1."""
    c = slopes(comm)
    model = Slope()
    optimizer = local(model, 2)
    model.load_state_dict({"w": torch.full((10,), 100.0)})
    for _ in range(2):
        step(optimizer, model, c[comm.rank])
    torch.testing.assert_close(model.w.detach(), torch.full((10,), 100 - 2 * mean(c)))
    variance = mean([(x - mean(c)) ** 2 for x in c])
    assert optimizer.divergence == pytest.approx(10 * 4 * variance, rel=1e-3, abs=1e-2)


def test_numbers_of_steps_that_differ_by_31(comm):
    model = Slope()
    optimizer = local(model, 100)
    for _ in range(31 if comm.rank == 0 else 62):
        step(optimizer, model, 0.0)
    if comm.size == 1:
        return
    with expect(comm, r"different numbers of local steps in this round, \[31, 62"):
        optimizer.synchronize()


def test_epochs_that_are_uneven_by_a_whole_round(comm):
    """Rank 0 evaluates while the others average once more: an error on all ranks, not another model on each."""
    model = Slope()
    optimizer = local(model, 4)
    steps = 4 if comm.rank == 0 else 8
    if comm.size == 1:
        return

    def epoch():
        for _ in range(steps):
            step(optimizer, model, 1.0)
        optimizer.synchronize()

    with pytest.raises(hvdlocal.CommunicationError, match=r"'hvdlocal.average'"):
        epoch()


def test_rounds_that_differ(comm):
    """A state that only rank 0 has loaded, as Horovod's examples do before they broadcast."""
    model = Slope()
    optimizer = local(model, 2)
    for _ in range(2):
        step(optimizer, model, 1.0)
    state = optimizer.state_dict()
    model = Slope()
    optimizer = local(model, 2)
    if comm.rank == 0:
        optimizer.load_state_dict(state)
    if comm.size == 1:
        return
    with expect(comm, r"\(rounds 0, not 1, progress 2.0, not 4.0|rounds 1, not 0.*different rounds"):
        for _ in range(2):
            step(optimizer, model, 1.0)


class Teacher(torch.nn.Module):
    """Mean teacher: a frozen copy follows this rank's replica, within the model."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = Slope(), Slope().requires_grad_(False)

    def forward(self, c):
        return self.student(c)

    def follow(self):
        with torch.no_grad():
            self.teacher.w.data.mul_(0.5).add_(self.student.w.data, alpha=0.5)


def test_a_teacher_that_follows_each_replica(comm):
    c = slopes(comm)
    model = Teacher()
    optimizer = local(model, 2)
    if comm.size == 1:
        return
    with expect(comm, r"'teacher.w'.*frozen parameters or integer buffers differ"):
        for _ in range(2):
            step(optimizer, model, c[comm.rank])
            model.follow()


def test_a_teacher_that_follows_the_average(comm):
    """Teacher = 5/2 + (5 − 2 mean c)/2 after the one round, on every rank."""
    c = slopes(comm)
    model = Teacher()
    optimizer = local(model, 2)
    for _ in range(2):
        step(optimizer, model, c[comm.rank])
        if optimizer.in_sync:
            model.follow()
    optimizer.synchronize()
    torch.testing.assert_close(model.teacher.w, torch.full((10,), 5 - mean(c)))


def assigned(layer, value):
    layer.load_state_dict({name: torch.full_like(one, value) for name, one in layer.state_dict().items()}, assign=True)


@BOTH
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda model, rank: setattr(model, "pointer", model.pointer + rank), "pointer"),
        (lambda model, rank: assigned(model["frozen"], float(rank)), "frozen.w"),
        (lambda model, rank: rank and delattr(model["frozen"], "w"), "frozen.w"),
    ],
    ids=["buffer", "parameter", "deleted"],
)
def test_what_takes_the_place_of_a_constant(comm, wrap, change, name):
    """Not in place: load_state_dict(assign=True), or a buffer that is assigned."""
    model = torch.nn.ModuleDict({"slope": Slope(), "frozen": Slope().requires_grad_(False)})
    model.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
    optimizer = wrap(model)
    change(model, 0)
    step(optimizer, model["slope"], 1.0)
    optimizer.synchronize()
    if comm.size > 1:
        change(model, comm.rank)
        with expect(comm, name):
            optimizer.synchronize()


@BOTH
def test_integer_buffers(comm, wrap):
    model = Slope()
    model.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
    optimizer = wrap(model)
    if comm.size == 1:
        return
    model.pointer += comm.rank
    with expect(comm, "'pointer'"):
        for _ in range(2):
            step(optimizer, model, 1.0)


def test_every_one_of_many_constants_has_its_turn(comm):
    """Four are looked at in each averaging: a difference in one of twenty is found within five."""
    model = Slope()
    for i in range(20):
        model.register_buffer(f"constant{i}", torch.zeros(200, dtype=torch.int64))
    optimizer = local(model, 1)
    if comm.size == 1:
        return
    model.constant17[5] += comm.rank
    with expect(comm, "'constant17'"):
        for _ in range(5):
            step(optimizer, model, 0.0)


def test_batch_norms_count_of_batches_may_differ(comm):
    """A forward pass on one rank only, for a summary of the model, has no effect on training."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = local(model, 1)
    if comm.rank == 0:
        model(torch.ones(3, 2))
    optimizer.synchronize()
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    assert int(model[1].num_batches_tracked) == (2 if comm.rank == 0 else 1)


@BOTH
def test_a_rank_that_has_joined(comm, wrap):
    """hvd.join() makes the absent rank's part of a sum zero: weights would be halved without a word."""
    if comm.backend != "horovod" or comm.size == 1:
        return
    import horovod.torch as hvd

    model = Slope()
    optimizer = wrap(model)

    def round_():
        for _ in range(2):
            step(optimizer, model, 1.0)

    if comm.rank != comm.size - 1:
        with pytest.raises(hvdlocal.CommunicationError, match=rf"1 of {comm.size} ranks took no part.*hvd.join"):
            round_()
    hvd.join()


def test_functions_in_a_parameter_group_are_equal(comm):
    """Their addresses differ between processes."""

    def decay(step):
        return 0.9**step

    class Rule:
        pass

    model = Slope()
    group = {"params": list(model.parameters()), "decay": decay, "rule": Rule(), "both": [lambda x: x, decay]}
    local(model, optimizer=torch.optim.SGD([group], lr=torch.tensor(0.1)))
    other = {**group, "decay": (decay if comm.rank else Rule())}
    if comm.size > 1:
        with pytest.raises(hvdlocal.DisagreementError, match="param group 0 decay"):
            local(model, optimizer=torch.optim.SGD([other], lr=0.1))


def test_the_order_of_a_set_is_no_difference(comm):
    """That of strings is another in every process."""
    words = {f"layer{i}" for i in range(20)}
    for value in (words, frozenset(words), {"names": [words, (words, 1)]}):
        model = Slope()
        local(model, optimizer=torch.optim.SGD([{"params": model.parameters(), "words": value}], lr=0.1))
        if comm.size > 1:
            other = torch.optim.SGD([{"params": model.parameters(), "words": {*words, str(comm.rank)}}], lr=0.1)
            with expect(comm, "param group 0 words"):
                local(model, optimizer=other)


def test_tensors_of_unequal_length(comm):
    """An error on every rank, not a sum of garbage on some."""
    if comm.size == 1:
        return
    with pytest.raises(hvdlocal.CommunicationError, match=r"'test.unequal' failed"):
        comm.sum_(torch.ones(10 + comm.rank, dtype=torch.float32), "test.unequal")
    equal = torch.ones(10, dtype=torch.float32)
    comm.sum_(equal, "test.equal")
    assert equal.tolist() == [comm.size] * 10


def test_collectives_in_another_order(comm):
    if (
        comm.size == 1 or comm.backend == "horovod"
    ):  # Horovod waits for its deadline: it pairs collectives by their names
        return
    with pytest.raises(hvdlocal.CommunicationError, match=r"rank 0: sum of 1 torch.float32 .test.first.; rank 1: sum"):
        comm.sum_(torch.ones(1, dtype=torch.float32), "test.first" if comm.rank == 0 else "test.second")


def test_replicas_that_differ_by_rounding(comm):
    """Nodes of different hardware: told once, by rank 0, and training goes on. A real difference is refused, as above."""
    model = Slope(100)
    optimizer = synchronous(model)
    model.w.data += 1e-6 * comm.rank
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            step(optimizer, model, 1.0)
        optimizer.synchronize()
    told = [str(one.message) for one in caught if "rounding errors" in str(one.message)]
    assert len(told) == (1 if comm.rank == 0 and comm.size > 1 else 0)
    torch.testing.assert_close(model.w.detach(), torch.full((100,), 2.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("numel", [10, 100, 100_000])
def test_parameters_that_are_moved_and_moved_back(comm, numel):
    """Sharpness-aware minimisation leaves rounding errors, different ones on every rank, before a step."""
    model = Slope(numel)
    with torch.no_grad():
        model.w.copy_(torch.randn(numel, generator=torch.Generator().manual_seed(99)))
    start = model.w.detach().clone()
    optimizer = local(model, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            optimizer.zero_grad()
            model(1.0).backward()
            away = torch.randn(numel, generator=torch.Generator().manual_seed(comm.rank))
            with torch.no_grad():
                model.w.add_(away).sub_(away)
            optimizer.step()
    torch.testing.assert_close(model.w.detach(), start - 4, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_embeddings_that_rescale_the_rows_they_look_up(comm, layer):
    """Every rank looks up other rows, and has changed them when a round begins."""
    model = torch.nn.ModuleDict({"table": layer(8, 4, max_norm=1.0), "slope": Slope()})
    torch.nn.init.constant_(model["table"].weight, 5.0)
    optimizer = local(model, 2)
    for i in range(4):
        optimizer.zero_grad()
        model["table"](torch.tensor([[(comm.rank + i) % 8]])).sum().backward()
        optimizer.step()
    optimizer.synchronize()
    with pytest.raises(ValueError, match="'table' has a max_norm"):
        synchronous(model)
    model["table"].requires_grad_(False)
    frozen = synchronous(model)
    for i in range(2):
        frozen.zero_grad()
        model["table"](torch.tensor([[comm.rank + i]]))
        model["slope"](1.0).backward()
        frozen.step()
    frozen.synchronize()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Please use quant_min")
@BOTH
def test_quantisation_aware_training(comm, wrap):
    """Each rank estimates ranges and zero points from its own data, in buffers that take their size from them."""
    quantization = pytest.importorskip("torch.ao.quantization")
    model = torch.nn.Sequential(quantization.QuantStub(), torch.nn.Linear(4, 2)).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model, inplace=True)
    optimizer = wrap(model)
    for i in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=torch.Generator().manual_seed(comm.rank)) + comm.rank + i).sum().backward()
        optimizer.step()
    optimizer.synchronize()
    ranges = comm.gather(float(model[0].activation_post_process.activation_post_process.max_val), "test.ranges")
    assert len(set(ranges)) == comm.size, "they are each rank's own"


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_what_lies_in_memory_in_another_order(comm, format):
    model = torch.nn.Conv2d(3, 8, 3).to(memory_format=format)
    optimizer = synchronous(model)
    if comm.size == 1:
        return
    if comm.rank == 0:
        model.weight.data.view(torch.int32).bitwise_xor_(1 << 22)  # finite, and far away
    model(torch.ones(1, 3, 4, 4)).sum().backward()
    with expect(comm, "'weight'"):
        optimizer.step()
