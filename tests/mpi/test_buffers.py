"""Buffers: which are averaged, which stay each rank's own, what a buffer that is not finite means, and odd kinds of memory."""

import math

import pytest
import torch
from support.models import Slope, everywhere_equal, local, mean, sgd, step
from torch.nn.utils.parametrizations import spectral_norm

import hvdlocal

INF, NAN = math.inf, math.nan


class Norm(torch.nn.Module):
    """A batch norm whose statistics are those of the last batch, and other buffers. The loss does not depend on them."""

    def __init__(self, **buffers):
        super().__init__()
        self.slope = Slope()
        self.norm = torch.nn.BatchNorm1d(2, momentum=1.0, affine=False)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x):
        return self.slope(1.0) + 0 * self.norm(x).sum()


def batch(centre):
    return torch.tensor([[-1.0], [1.0]]).expand(2, 2) + centre


def synchronous(model, **settings):
    return hvdlocal.SynchronousOptimizer(sgd(model, lr=0.1), model, **settings)


def localised(model, **settings):
    return local(model, 1, optimizer=sgd(model, lr=0.1), **settings)


def train(optimizer, model, x, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()


def step_and_synchronize(optimizer):
    """A LocalOptimizer averages in the first, a SynchronousOptimizer its buffers in the second."""
    optimizer.step()
    optimizer.synchronize()


pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor", "ignore:torch.quantize_per_tensor")
BOTH = pytest.mark.parametrize("make", [localised, synchronous], ids=["local", "synchronous"])


@BOTH
def test_running_statistics_are_averaged_and_other_buffers_are_each_ranks_own(comm, make):
    model = Norm(queue=torch.zeros(3), count=torch.zeros((), dtype=torch.int64))
    optimizer = make(model)
    assert optimizer.buffer_policies == {
        "queue": "local",
        "count": "local",
        "norm.running_mean": "average",
        "norm.running_var": "average",
        "norm.num_batches_tracked": "local",
    }
    assert optimizer.kept_buffers == ["queue"]
    model.queue.fill_(comm.rank)
    train(optimizer, model, batch(comm.rank))
    optimizer.synchronize()
    torch.testing.assert_close(model.norm.running_mean, torch.full((2,), mean(range(comm.size))))
    assert torch.equal(model.queue, torch.full((3,), float(comm.rank)))


@BOTH
def test_what_counts_as_running_statistics(comm, make):
    model = torch.nn.ModuleDict(
        {
            "instance": torch.nn.InstanceNorm1d(2, track_running_stats=True),
            "plain": torch.nn.InstanceNorm1d(2),
            "sync": torch.nn.SyncBatchNorm(2),
            "group": torch.nn.GroupNorm(1, 2),
            "slope": Slope(),
        }
    )
    averaged = [name for name, policy in make(model).buffer_policies.items() if policy == "average"]
    assert averaged == [f"{module}.running_{moment}" for module in ("instance", "sync") for moment in ("mean", "var")]


PATTERNS = [
    ({"queue": "average"}, {"queue", "norm.running_mean", "norm.running_var"}),
    ({"norm": "local"}, set()),
    ({"norm.*": "local", "bank*": "average"}, {"bank.old", "bank.new"}),
    ({"bank": "average"}, {"bank.old", "bank.new", "norm.running_mean", "norm.running_var"}),
    ({"bank.old": "local", "bank": "average", "norm": "reestimate"}, {"bank.new"}),
    ({"*": "average"}, {"queue", "bank.old", "bank.new", "norm.running_mean", "norm.running_var"}),
    ({}, {"norm.running_mean", "norm.running_var"}),
    ("local", set()),
    ("reestimate", set()),
]


@pytest.mark.parametrize(("buffers", "averaged"), PATTERNS, ids=[str(buffers) for buffers, _ in PATTERNS])
@BOTH
def test_policies_by_name(comm, make, buffers, averaged):
    model = Norm(queue=torch.zeros(3), count=torch.zeros((), dtype=torch.int64))
    model.bank = torch.nn.Module()
    model.bank.register_buffer("old", torch.zeros(3))
    model.bank.register_buffer("new", torch.zeros(3), persistent=False)
    optimizer = make(model, buffers=buffers)
    floats = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    train(optimizer, model, batch(0.0))
    for buffer in floats.values():
        buffer.fill_(comm.rank)
    if make is localised:
        model.slope(0.0).backward()
        optimizer.step()
    optimizer.synchronize()
    for name, buffer in floats.items():
        expected = mean(range(comm.size)) if name in averaged else comm.rank
        torch.testing.assert_close(buffer, torch.full_like(buffer, expected), msg=name)


REFUSED = [
    ({"quue": "average"}, r"'quue'.*matches no buffer.*there are 'queue', 'count', 'norm.running_mean'"),
    ({"queue": "mean"}, r"'queue': 'mean'.*choose one of average, local, reestimate"),
    ({"count": "average"}, r"only floating-point buffers.*'count' is not one"),
    ({"queue": "reestimate"}, r"only running statistics of batch norm.*'queue' is not one"),
    ({3: "average"}, "a pattern is a string"),
    ("mean", r"buffers='mean': choose one of average, local, reestimate, or give a mapping"),
    (["average"], "choose one of"),
    (None, "choose one of"),
]


@pytest.mark.parametrize(("buffers", "message"), REFUSED, ids=[str(buffers) for buffers, _ in REFUSED])
@BOTH
def test_policies_that_cannot_be_meant_are_refused(comm, make, buffers, message):
    with pytest.raises(ValueError, match=message):
        make(Norm(queue=torch.zeros(3), count=torch.zeros((), dtype=torch.int64)), buffers=buffers)


def test_patterns_that_differ_between_ranks_are_found(comm):
    buffers = {"queue": "average" if comm.rank else "local"}
    if comm.size == 1:
        return
    with pytest.raises(hvdlocal.DisagreementError, match=r"buffers: rank 1 has .*'average'.*rank 0 has .*'local'"):
        localised(Norm(queue=torch.zeros(3)), buffers=buffers)


def test_two_names_of_one_buffer(comm):
    shared = torch.zeros(3)
    with pytest.raises(ValueError, match="names of one buffer, and must have the same policy"):
        localised(Norm(one=shared, other=shared), buffers={"one": "average", "other": "local"})
    optimizer = localised(Norm(one=shared, other=shared), buffers={"other": "average"})
    assert optimizer.buffer_policies["one"] == "average"


# -- what a buffer holds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [INF, -INF, NAN, torch.finfo(torch.float32).min, torch.finfo(torch.float32).max])
@BOTH
def test_a_mask_or_a_buffer_not_used_yet_says_nothing_about_the_model(comm, make, value):
    model = Norm(mask=torch.full((3, 3), value).triu(1), unused=torch.full((2,), value))
    optimizer = make(model)
    train(optimizer, model, batch(comm.rank), steps=3)
    optimizer.synchronize()
    torch.testing.assert_close(model.slope.w.detach(), torch.full((10,), 4.7))
    assert torch.equal(model.mask.nan_to_num(1.5), torch.full((3, 3), value).triu(1).nan_to_num(1.5))


@BOTH
def test_statistics_that_are_not_finite_on_one_rank_are_named_and_not_spread(comm, make):
    last = comm.size - 1
    model = Norm()
    optimizer = make(model)
    model.norm(batch(NAN if comm.rank == last else comm.rank))
    model.slope(1.0).backward()
    message = rf"averaged buffers: 'norm.running_mean' on rank {last} and 1 more there.*'norm.running_mean': 'local'"
    with pytest.raises(hvdlocal.NonFiniteError, match=message):
        step_and_synchronize(optimizer)
    torch.testing.assert_close(model.slope.w.detach(), torch.full((10,), 4.9))
    if comm.size > 1:
        torch.testing.assert_close(model.norm.running_mean, torch.full((2,), mean(range(last))))
        train(optimizer, model, batch(comm.rank))  # and training can go on
        optimizer.synchronize()
        torch.testing.assert_close(model.norm.running_mean, torch.full((2,), mean(range(comm.size))))
    else:
        assert model.norm.running_mean.isnan().all(), "never a number that nobody computed"


@BOTH
def test_a_single_number_that_is_not_finite_names_its_buffer(comm, make):
    model = Norm()
    optimizer = make(model)
    train(optimizer, model, batch(0.0))
    if comm.rank == 0:
        model.norm.running_var[1] = INF
    model.slope(0.0).backward()
    with pytest.raises(hvdlocal.NonFiniteError, match=r"buffers: 'norm.running_var' on rank 0: "):
        step_and_synchronize(optimizer)


def test_a_lost_model_is_not_blamed_on_its_buffers(comm):
    model = Norm()
    optimizer = localised(model)
    x = batch(NAN if comm.rank == 0 else 1.0)
    model.norm(x)
    model.slope(NAN if comm.rank == 0 else 1.0).backward()
    with pytest.raises(hvdlocal.NonFiniteError, match=rf"on rank 0 of {comm.size} .*model"):
        optimizer.step()
    if comm.size > 1:
        torch.testing.assert_close(model.norm.running_mean, torch.ones(2))
        torch.testing.assert_close(model.slope.w.detach(), torch.full((10,), 4.9))


def test_reestimated_statistics_leave_other_buffers_alone(comm):
    model = Norm(queue=torch.zeros(3))
    optimizer = localised(model, buffers="reestimate")
    train(optimizer, model, batch(comm.rank))
    model.queue.fill_(comm.rank)
    optimizer.reestimate_buffers([batch(comm.rank), batch(comm.rank + 2)])
    torch.testing.assert_close(model.norm.running_mean, torch.full((2,), mean(range(comm.size)) + 1))
    assert torch.equal(model.queue, torch.full((3,), float(comm.rank)))
    with pytest.raises(hvdlocal.NonFiniteError, match=r"'norm.running_mean' on rank 0"):
        optimizer.reestimate_buffers([batch(NAN if comm.rank == 0 else 0.0)])


def test_equal_statistics_stay_as_they_are(comm):
    """Frozen batch norm: a mean of equal numbers is that number, to the last bit."""
    model = Norm()
    optimizer = localised(model)
    values = torch.rand(2, generator=torch.Generator().manual_seed(1)) + 0.1
    model.norm.running_mean.copy_(values)
    model.norm.eval()
    train(optimizer, model, batch(comm.rank), steps=5)
    assert torch.equal(model.norm.running_mean, values)


def spectral_net(layers, make):
    torch.manual_seed(0)
    return torch.nn.Sequential(*[make(torch.nn.Linear(24, 24)) for _ in range(layers)])


@pytest.mark.parametrize("norm", [spectral_norm, torch.nn.utils.spectral_norm], ids=["parametrization", "hook"])
def test_spectral_norm_keeps_unit_vectors_and_its_norm(comm, norm):
    """Each rank trains six layers on data of its own for 32 steps; averaged u and v were no unit vectors any more."""
    model = spectral_net(6, norm)
    optimizer = local(model, 32, optimizer=sgd(model, lr=0.5))
    generator = torch.Generator().manual_seed(comm.rank)
    for _ in range(2 * 32):
        optimizer.zero_grad()
        x = torch.randn(16, 24, generator=generator)
        (model(x) - x.roll(comm.rank + 1, 1)).square().mean().backward()
        optimizer.step()
    vectors = [buffer for name, buffer in model.named_buffers() if name.endswith(("_u", "_v"))]
    assert len(vectors) == 12
    for vector in vectors:
        assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
    optimizer.synchronize()
    model.eval()
    with optimizer.published(), torch.no_grad():
        out = model(torch.eye(24))
        assert everywhere_equal(comm, out), "the published model is one model"
        for layer in model:
            weight = layer(torch.eye(24)) - layer(torch.zeros(1, 24))
            assert 0.9 < float(torch.linalg.matrix_norm(weight, 2)) < 1.7, "without averaging, a single rank has 1.59"


@BOTH
def test_the_published_model_has_rank_0s_own_buffers(comm, make):
    model = Norm(queue=torch.zeros(3), rows=torch.zeros(1).expand(3), count=torch.zeros((), dtype=torch.int64))
    optimizer = make(model, buffers="local")
    model.norm(batch(comm.rank))
    for name in ("queue", "count"):
        getattr(model, name).fill_(comm.rank)
    with optimizer.published():
        assert torch.equal(model.norm.running_mean, torch.zeros(2))
        assert torch.equal(model.queue, torch.zeros(3))
        assert model.count == 0
    assert torch.equal(model.norm.running_mean, torch.full((2,), float(comm.rank)))
    assert torch.equal(model.queue, torch.full((3,), float(comm.rank)))
    assert model.count == comm.rank
    with pytest.raises(KeyError), optimizer.published():
        raise KeyError
    assert model.count == comm.rank, "also after an error"


# -- how a buffer lies in memory -------------------------------------------------------------------------------------------


def two_norms(share):
    """Two batch norms, the second with running means made by `share` from the first's."""
    model = torch.nn.Sequential(*(torch.nn.BatchNorm1d(4, momentum=1.0) for _ in range(2)))
    model[1].running_mean = share(model[0].running_mean)
    return model


@pytest.mark.parametrize(
    "share", [lambda mean: mean, torch.Tensor.detach, lambda mean: mean.view(4)], ids=["same", "detached", "view"]
)
def test_buffers_that_are_the_same_memory_stay_so(comm, share):
    model = two_norms(share)
    optimizer = localised(model)
    assert model[1].running_mean.data_ptr() == model[0].running_mean.data_ptr()
    model[0].running_mean.fill_(comm.rank)
    assert torch.equal(model[1].running_mean, model[0].running_mean)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    torch.testing.assert_close(model[1].running_mean, torch.full((4,), mean(range(comm.size))))
    optimizer.step()


def test_parts_of_one_memory_that_do_not_overlap_are_averaged(comm):
    table = torch.zeros(2, 4)
    columns = torch.zeros(4, 2)
    model = torch.nn.Sequential(*(torch.nn.BatchNorm1d(4, momentum=1.0) for _ in range(2)))
    for i in range(2):
        model[i].running_mean = table[i]
        model[i].running_var = columns[:, i]
    optimizer = localised(model)
    for i in range(2):
        model[i].running_mean.fill_(comm.rank + i)
        model[i].running_var.fill_(comm.rank + 2 * i)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    for i in range(2):
        torch.testing.assert_close(model[i].running_mean, torch.full((4,), mean(range(comm.size)) + i))
        torch.testing.assert_close(model[i].running_var, torch.full((4,), mean(range(comm.size)) + 2 * i))


def overlapping_buffers():
    table = torch.zeros(6)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4))
    model[0].running_mean, model[1].running_mean = table[:4], table[2:]
    return model


def reversed_buffer():
    model = torch.nn.BatchNorm2d(4)
    model.register_buffer("window", model.running_mean[1:3])
    return model


def tied_by_data():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data
    return model


def weight_as_buffer():
    model = torch.nn.Linear(3, 3)
    model.register_buffer("transposed", model.weight.detach().t())
    return model


SHARED = [
    (overlapping_buffers, "'0.running_mean' and '1.running_mean' share memory"),
    (reversed_buffer, "'running_mean' and 'window' share memory"),
    (tied_by_data, "'0.weight' and '1.weight' share memory.*same Parameter"),
    (weight_as_buffer, "'weight' and 'transposed' share memory"),
]


@pytest.mark.parametrize(("build", "message"), SHARED, ids=[build.__name__ for build, _ in SHARED])
def test_sharing_that_would_end_is_refused_by_name(comm, build, message):
    with pytest.raises(ValueError, match=message):
        localised(build())
    synchronous(build())  # moves nothing


def test_a_model_can_be_wrapped_again(comm):
    """Its parameters are parts of one memory by then."""
    model = Norm()
    localised(model)
    optimizer = localised(model)
    train(optimizer, model, batch(comm.rank))
    torch.testing.assert_close(model.norm.running_mean, torch.full((2,), mean(range(comm.size))))


@BOTH
def test_expanded_sparse_and_complex_buffers_start_as_on_rank_0(comm, make):
    value = float(comm.rank + 1)
    dense = torch.tensor([[0.0, value], [value, 0.0]])
    buffers = {
        "expanded": torch.full((1, 3), value).expand(4, 3),
        "windows": torch.full((5,), value).as_strided((3, 3), (1, 1)),
        "coo": dense.to_sparse_coo(),
        "csr": dense.to_sparse_csr(),
        "csc": dense.to_sparse_csc(),
        "bsr": dense.to_sparse_bsr((1, 1)),
        "complex": torch.full((3,), complex(value, -value)),
        "brief": torch.full((3,), value, dtype=torch.float16),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([comm.rank == 0]),
    }
    model = Norm(**buffers)
    optimizer = make(model)
    for name in buffers:
        found = getattr(model, name)
        found = found.to_dense() if found.layout != torch.strided else found
        rank_0 = {"complex": complex(1, -1), "flags": True}.get(name, 1)
        if name in ("coo", "csr", "csc", "bsr"):
            assert torch.equal(found, torch.tensor([[0.0, 1.0], [1.0, 0.0]])), name
        else:
            assert torch.equal(found, torch.full_like(found, rank_0)), name
    train(optimizer, model, batch(comm.rank))
    optimizer.synchronize()
    with optimizer.published():
        pass


def test_sparse_buffers_of_another_number_of_elements_are_found(comm):
    dense = torch.eye(3 + comm.size)
    dense[0, 1] = comm.rank
    if comm.size > 1:
        with pytest.raises(hvdlocal.DisagreementError, match=r"model \(names, shapes"):
            localised(Norm(adjacency=dense.to_sparse_csr()))


def lazy_norm():
    return torch.nn.Sequential(torch.nn.LazyBatchNorm1d(affine=False), torch.nn.Linear(2, 2))


ODD = [
    (lambda: Norm(table=torch.zeros(3, device="meta")), {}, "buffer 'table' lies on the meta device"),
    (lazy_norm, {}, "buffer '0.running_mean' has no shape yet"),
    (
        lambda: Norm(table=torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)),
        {},
        "buffer 'table' is a quantized tensor",
    ),
    (
        lambda: Norm(table=torch.eye(3).to_sparse_coo()),
        {"buffers": {"table": "average"}},
        r"buffer 'table' has the layout sparse_coo.*buffers=\{'table': 'local'\}",
    ),
    (lambda: Norm(table=torch.zeros(3, dtype=torch.complex64)), {"buffers": {"table": "average"}}, "floating-point"),
]


@pytest.mark.parametrize(("build", "settings", "message"), ODD, ids=[message for *_, message in ODD])
@BOTH
def test_odd_buffers_are_refused_by_name(comm, make, build, settings, message):
    with pytest.raises(ValueError, match=message):
        make(build(), **settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_statistics_of_other_dtypes(comm, dtype):
    """They cannot lie among float32 parameters, but are averaged by themselves in data parallelism."""
    model = Norm(queue=torch.zeros(3, dtype=dtype))
    model.norm.to(dtype)
    with pytest.raises(ValueError, match=rf"buffer 'norm.running_mean' is {dtype}.*'norm.running_mean': 'local'"):
        localised(model)
    localised(model, buffers={"norm": "local"})
    optimizer = synchronous(model)
    model.norm.running_mean.fill_(comm.rank)
    optimizer.synchronize()
    expected = torch.full((2,), mean(range(comm.size)), dtype=dtype)
    torch.testing.assert_close(model.norm.running_mean, expected)
    step(optimizer, model.slope, 1.0)
