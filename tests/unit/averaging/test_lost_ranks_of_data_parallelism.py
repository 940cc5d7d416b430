"""A step of SynchronousOptimizer is that of the ranks that are left, whichever of its sums a rank does not come to."""

import pytest
import torch
from support.models import flat, sgd
from support.mortal import Death, run_mortal

import hvdlocal

RANKS = 4
WIDTH = 8
ROW = 4 * WIDTH * WIDTH  # bytes of one layer's weight
SUMS = 6  # of a step in buckets of one layer each
STEPS = 6
GRADIENTS = "hvdlocal.gradients"  # and the beginning of the buckets' names


def layers():
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential()
    for _ in range(SUMS):
        model.extend([torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float32), torch.nn.Tanh()])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / WIDTH**0.5)
    return model


def inputs(rank, i):
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * i + rank), dtype=torch.float32)


def loss_of(model, rank, i):
    return model(inputs(rank, i)).square().sum()


# -- loops: what lies between two steps ----------------------------------------------------------------------------------


def plain(model, optimizer, rank, i):
    optimizer.zero_grad()
    loss_of(model, rank, i).backward()


def kept_in_place(model, optimizer, rank, i):
    """The gradients lie in the memory of the last sums."""
    optimizer.zero_grad(set_to_none=False)
    loss_of(model, rank, i).backward()


def changed(model, optimizer, rank, i):
    """Gradients that change after their sums have begun, from the second step on."""
    plain(model, optimizer, rank, i)
    if i:
        loss_of(model, rank, i + 50).backward()


def changed_and_kept(model, optimizer, rank, i):
    kept_in_place(model, optimizer, rank, i)
    if i:
        loss_of(model, rank, i + 50).backward()


def communicating(model, optimizer, rank, i):
    """Some sums have begun when the loop comes to a collective of its own."""
    plain(model, optimizer, rank, i)
    optimizer.communicator.gather(i, "the loop's")


def train(loop, deaths, bucket_bytes, **settings):
    """Trains on mortal ranks.

    Returns:
        The parameters after every step of the ranks that are left, whose bits are the same; and the collectives of the last one.
    """

    def body(comm):
        own, model = comm.rank, layers()
        optimizer = hvdlocal.SynchronousOptimizer(
            sgd(model, 0.05, momentum=0.9), model, bucket_bytes=bucket_bytes, communicator=comm, **settings
        )
        trace = []
        for i in range(STEPS * settings.get("accumulate", 1)):
            before = comm.traffic.collectives
            loop(model, optimizer, own, i)
            optimizer.step()
            trace.append(flat(model))
        return torch.stack(trace), comm.traffic.collectives - before, optimizer.num_workers, optimizer.gain

    found = [result for result in run_mortal(RANKS, body, *deaths) if result is not None]
    assert len(found) == RANKS - len(deaths)
    trace, collectives, workers, gain = found[0]
    assert all(torch.equal(trace, one) for one, *_ in found)
    assert all((workers, gain) == (others, other) for _, _, others, other in found)
    return trace, collectives, workers, gain


def at(step, number):
    """The occurrence of a sum of a step, both from 1, if no sums were repeated before."""
    return SUMS * (step - 1) + number


@pytest.mark.filterwarnings("ignore:gradients changed")
@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate": 2}, {"max_norm": 0.05}, {"scaling": hvdlocal.AdaScale()}],
    ids=["plain", "accumulate", "max_norm", "adascale"],
)
@pytest.mark.parametrize(
    ("step", "number"), [(1, 1), (1, 3), (3, 1), (3, 4), (3, 6), (6, 2)], ids=lambda number: str(number)
)
@pytest.mark.parametrize("loop", [plain, kept_in_place], ids=lambda loop: loop.__name__)
def test_a_death_at_any_sum_of_a_step(loop, step, number, settings):
    """The bits are those of a step in one collective to which the rank does not come."""
    buckets = train(loop, [Death(1, GRADIENTS, at(step, number))], ROW, **settings)
    one_message = train(loop, [Death(1, GRADIENTS, step)], None, **settings)
    assert torch.equal(buckets[0], one_message[0])
    assert buckets[2:] == one_message[2:]
    if step < STEPS:
        assert buckets[1] == SUMS, "sums are repeated in the step of the loss alone"


@pytest.mark.filterwarnings("ignore:gradients changed")
@pytest.mark.parametrize(
    ("step", "occurrence"),
    # Sums 1 to 6 are those of the first step; 7 to 18 of the second, which repeats them, as the third and the fourth do. After
    # that none begins early, so that sums 43 to 48 are those of the fifth.
    [(2, 8), (2, 12), (2, 13), (2, 16), (2, 18), (4, 40), (5, 45), (5, 48), (6, 50)],
)
@pytest.mark.parametrize("loop", [changed, changed_and_kept], ids=lambda loop: loop.__name__)
def test_a_death_where_sums_are_repeated_anyway(loop, step, occurrence):
    buckets = train(loop, [Death(2, GRADIENTS, occurrence)], ROW)
    assert torch.equal(buckets[0], train(loop, [Death(2, GRADIENTS, step)], None)[0])


@pytest.mark.parametrize(
    "occurrences",
    [
        pytest.param((at(3, 2), at(3, 2)), id="together"),
        pytest.param((at(3, 2), at(3, 5)), id="at two sums"),
        pytest.param((at(3, 2), at(3, 6) + 1), id="at a repeated sum"),
        pytest.param((at(3, 2), at(3, 6) + 5), id="at another repeated sum"),
        pytest.param((at(3, 2), at(3, 6) + 4, at(3, 6) + SUMS + 4), id="when sums are repeated again"),
    ],
)
def test_several_deaths_in_a_step(occurrences):
    """Also of all ranks but one."""
    ranks = [0, 3, 1][: len(occurrences)]
    buckets = train(plain, [Death(*one) for one in zip(ranks, [GRADIENTS] * 3, occurrences, strict=False)], ROW)
    one_message = train(plain, [Death(rank, GRADIENTS, 3) for rank in ranks], None)
    assert torch.equal(buckets[0], one_message[0])
    assert buckets[2] == RANKS - len(ranks)


@pytest.mark.parametrize("bucket_bytes", [ROW, None], ids=["buckets", "one message"])
def test_a_death_between_the_backward_pass_and_the_step(bucket_bytes):
    """Some sums have begun before it, and have the gradients of the lost rank."""
    found = train(communicating, [Death(3, "the loop's", 4)], bucket_bytes)
    expected = train(plain, [Death(3, GRADIENTS, 4)], None)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("bucket_bytes", [ROW, None], ids=["buckets", "one message"])
@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"max_norm": 0.05}], ids=str)
def test_the_steps_are_those_of_one_process(settings, bucket_bytes):
    """That computes the gradients of all ranks, and after the third step of all but the one that dies at the fourth."""
    accumulate, max_norm = settings.get("accumulate", 1), settings.get("max_norm")
    number = at(4, 1) if bucket_bytes else 4
    found, *_ = train(plain, [Death(1, GRADIENTS, number)], bucket_bytes, **settings)

    model = layers()
    optimizer = sgd(model, 0.05, momentum=0.9)
    for i in range(STEPS):
        ranks = range(RANKS) if i < 3 else [0, 2, 3]
        optimizer.zero_grad()
        for batch in range(i * accumulate, (i + 1) * accumulate):
            for rank in ranks:
                (loss_of(model, rank, batch) / (len(ranks) * accumulate)).backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        torch.testing.assert_close(found[(i + 1) * accumulate - 1], flat(model), rtol=1e-5, atol=1e-6)


def test_nothing_is_sent_twice_without_a_loss():
    assert train(plain, [], ROW)[1] == SUMS
    assert train(plain, [], None)[1] == 1


def test_a_loss_is_told_at_the_end_of_its_step():
    def body(comm):
        own, model = comm.rank, layers()
        told, seen = [], []
        optimizer = hvdlocal.SynchronousOptimizer(
            sgd(model, 0.05), model, bucket_bytes=ROW, communicator=comm, on_loss=told.append
        )
        for i in range(3):
            plain(model, optimizer, own, i)
            optimizer.step()
            seen.append((optimizer.num_workers, [loss.ranks for loss in told]))
        return seen

    results = run_mortal(RANKS, body, Death(0, GRADIENTS, at(2, 3)))
    assert results == [None] + [[(4, []), (3, [(0,)]), (3, [(0,)])]] * 3
