"""Training goes on after a loss as if the lost ranks had left at that collective: values that were worked out by hand.

Rank k's loss is c·Σw with c = 2^k, so that each step of SGD at the rate 1 moves its ten weights, which begin at 5, by −c times
the gain. A rank dies as it enters a collective, which the others notice when they wait for it.
"""

import math

import pytest
import torch
from support.models import Slope, local, sgd, step
from support.mortal import Death, run_mortal

import hvdlocal
from hvdlocal.communicator import SingleProcess

AVERAGE = "hvdlocal.average"
GRADIENTS = "hvdlocal.gradients"


def slope(comm):
    """C of a rank, and its model."""
    return 2.0**comm.rank, Slope()


def weight(model):
    """The weights, which are all equal."""
    assert len(model.w.unique()) == 1
    return model.w[0].item()


def ranks_of(losses):
    return [loss.ranks for loss in losses]


def left(results):
    """The result of the ranks that are left, which is the same on all of them."""
    found = [result for result in results if result is not None]
    assert all(result == found[0] for result in found)
    return found[0]


# -- local steps ---------------------------------------------------------------------------------------------------------


def test_the_mean_is_that_of_the_ranks_that_are_left():
    def body(comm):
        (c, model), told = slope(comm), []
        optimizer = local(model, 2, communicator=comm, on_loss=told.append)
        ends, seen = [], []
        for _ in range(3):
            for _ in range(2):
                step(optimizer, model, c)
                seen.append((optimizer.num_workers, len(told)))
            ends.append(weight(model))
        return ends, seen, [(loss.ranks, loss.remaining, loss.collective) for loss in told]

    results = run_mortal(4, body, Death(3, AVERAGE, 2), Death(0, AVERAGE, 3))
    assert [result is None for result in results] == [True, False, False, True]
    ends, seen, told = left(results)
    # 5 − 2·(1 + 2 + 4 + 8)/4 = −2.5; the mean of 1, 2 and 4 is 7/3, that of 2 and 4 is 3.
    assert ends == pytest.approx([-2.5, -2.5 - 14 / 3, -2.5 - 14 / 3 - 6])
    assert seen == [(4, 0)] * 3 + [(3, 1)] * 2 + [(2, 2)]
    assert told == [((3,), 3, AVERAGE), ((0,), 2, AVERAGE)]


def test_one_rank_that_is_left():
    """It goes on alone, also with LocalAdaScale, although one gradient has no variance."""

    def body(comm):
        c, model = slope(comm)
        told = []
        optimizer = local(model, 2, communicator=comm, scaling=hvdlocal.LocalAdaScale(), on_loss=told.append)
        for _ in range(2):
            step(optimizer, model, c)
        first = weight(model)
        estimate = optimizer.grad_sqr, optimizer.grad_var
        for _ in range(4):
            step(optimizer, model, c)
        optimizer.synchronize()
        return first, estimate, weight(model), optimizer.num_workers, optimizer.gain, ranks_of(told)

    result = left(run_mortal(3, body, Death(0, AVERAGE), Death(2, AVERAGE)))
    # 5 − 2·2, without an estimate; the gain stays 1.
    assert result == (1.0, (None, None), 1.0 - 4 * 2, 1, 1.0, [(0, 2)])


def test_the_loss_and_the_divergence_are_those_of_the_ranks_that_are_left():
    def body(comm):
        c, model = slope(comm)
        optimizer = local(model, 1, communicator=comm)
        step(optimizer, model, c)
        return optimizer.loss, optimizer.divergence

    loss, divergence = left(run_mortal(3, body, Death(2, AVERAGE)))
    # Losses 1·50 and 2·50; (1/2)·10·(0.5² + 0.5²) around the mean 1.5.
    assert loss == pytest.approx(75)
    assert divergence == pytest.approx(2.5)


def test_ranks_that_are_lost_elsewhere_are_told_at_the_end_of_the_next_step():
    """In a collective of the caller's; the average that was begun before it still has their contributions."""

    def body(comm):
        (c, model), told, seen = slope(comm), [], []
        optimizer = local(model, 1, communicator=comm, overlap=3, on_loss=told.append)
        step(optimizer, model, c)  # begins the average of 4, 3 and 1
        seen.append(comm.gather(c, "the caller's"))
        seen.append((optimizer.num_workers, ranks_of(told)))
        step(optimizer, model, c)  # applies it, then begins the next one
        seen.append((optimizer.num_workers, ranks_of(told)))
        own, divergence = weight(model), optimizer.divergence
        optimizer.synchronize()
        return seen, own - -c, divergence, weight(model)

    seen, carried_to, divergence, end = left(run_mortal(3, body, Death(2, "the caller's")))
    assert seen == [[1, 2], (2, []), (2, [(2,)])]
    # The mean of 4, 3 and 1 is 8/3, from which each rank goes on by −c.
    assert carried_to == pytest.approx(8 / 3)
    assert divergence == pytest.approx(10 / 3 * ((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2))
    assert end == pytest.approx(8 / 3 - 1.5)


def test_losses_are_told_in_order_and_once():
    def body(comm):
        (c, model), told = slope(comm), []
        optimizer = local(model, 2, communicator=comm, on_loss=told.append)
        comm.gather(0, "one")
        comm.gather(0, "two")
        step(optimizer, model, c)
        first = ranks_of(told)
        step(optimizer, model, c)
        second = ranks_of(told)
        optimizer.synchronize()
        return first, second, ranks_of(told), [loss.collective for loss in told]

    deaths = Death(3, "one"), Death(1, "two"), Death(0, AVERAGE, 2)
    assert left(run_mortal(5, body, *deaths)) == (
        [(3,), (1,)],
        [(3,), (1,)],
        [(3,), (1,), (0,)],
        ["one", "two", AVERAGE],
    )


def test_losses_of_before_are_not_told():
    def body(comm):
        comm.barrier("before")
        (c, model), told = slope(comm), []
        optimizer = local(model, 1, communicator=comm, on_loss=told.append)
        step(optimizer, model, c)
        return told, optimizer.num_workers

    assert left(run_mortal(3, body, Death(1, "before"))) == ([], 2)


def test_a_callback_may_communicate():
    def body(comm):
        c, model = slope(comm)
        seen = []

        def on_loss(loss):
            seen.append((loss.ranks, comm.gather(c, "told")))
            optimizer.synchronize()

        optimizer = local(model, 1, communicator=comm, on_loss=on_loss)
        for _ in range(2):
            step(optimizer, model, c)
        return seen

    # Rank 0 dies while the death of rank 2 is told, and is told in turn.
    assert left(run_mortal(4, body, Death(2, AVERAGE), Death(0, "told"))) == [((2,), [2, 8]), ((0,), [2, 8])]


def test_on_loss_must_be_a_function():
    with pytest.raises(ValueError, match=r"on_loss=3: give a function"):
        local(Slope(), on_loss=3, communicator=SingleProcess())


# -- gains and statistics ------------------------------------------------------------------------------------------------


def test_linear_scaling():
    def body(comm):
        (c, model), seen = slope(comm), []
        optimizer = local(
            model, 2, optimizer=sgd(model, 0.1), communicator=comm, scaling=hvdlocal.LinearScaling(warmup=0)
        )
        for _ in range(4):
            step(optimizer, model, c)
            seen.append((optimizer.gain, optimizer.progress))
        return seen, weight(model)

    seen, end = left(run_mortal(4, body, Death(1, AVERAGE)))
    # A step counts K: 4 until the average, 3 after it.
    assert seen == [(4, 4), (4, 8), (3, 11), (3, 14)]
    # 2 steps at 0.1·4 and 2 at 0.1·3, along (1 + 4 + 8)/3.
    assert end == pytest.approx(5 - (0.8 + 0.6) * 13 / 3, rel=1e-5)


def estimates(*slopes):
    """(G, σ²) of gradients whose ten elements are all c, for each c."""
    squares = [10 * c**2 for c in slopes]
    of_mean = 10 * (sum(slopes) / len(slopes)) ** 2
    return hvdlocal.gradient_statistics(sum(squares) / len(squares), of_mean, len(slopes))


@pytest.mark.parametrize("stale", [True, False])
def test_local_adascale(stale):
    """The statistics are those of the ranks that are left, and so is K of the next gain."""

    def body(comm):
        (c, model), seen = slope(comm), []
        scaling = hvdlocal.LocalAdaScale(stale=stale, smoothing=0.0)
        optimizer = local(model, 2, communicator=comm, scaling=scaling)
        for _ in range(3):
            step(optimizer, model, c)
            seen.append((optimizer.grad_sqr, optimizer.grad_var, optimizer.gain))
        return seen

    collective = AVERAGE if stale else "hvdlocal.statistics"
    seen = left(run_mortal(4, body, Death(3, collective)))
    # c = 1, 2, 4: σ² = 3/2·(10·21/3 − 10·49/9) = 23.33, G = 54.44 − σ²/3 = 46.67.
    grad_sqr, grad_var = estimates(1, 2, 4)
    assert (grad_sqr, grad_var) == pytest.approx((140 / 3, 70 / 3))
    assert seen[-1] == pytest.approx((grad_sqr, grad_var, hvdlocal.gain_ratio(grad_sqr, grad_var, 3, 2)))
    if not stale:
        assert seen[0] == pytest.approx(seen[-1])


def test_held_statistics_have_the_ranks_of_their_sum():
    """They wait for the end of the round; a rank that dies meanwhile is in them."""

    def body(comm):
        (c, model), seen = slope(comm), []
        scaling = hvdlocal.LocalAdaScale(smoothing=0.0)
        optimizer = local(model, 3, communicator=comm, scaling=scaling, overlap=1, mixing=0)
        for _ in range(4):
            step(optimizer, model, c)
        seen.append((optimizer.num_workers, optimizer.grad_sqr))
        comm.gather(0, "the caller's")
        seen.append((optimizer.num_workers, optimizer.grad_sqr))
        state = optimizer.state_dict()
        for _ in range(2):
            step(optimizer, model, c)
        seen.append((optimizer.num_workers, optimizer.grad_sqr, optimizer.grad_var))
        optimizer.load_state_dict(state)
        for _ in range(2):
            step(optimizer, model, c)
        return seen, (optimizer.num_workers, optimizer.grad_sqr, optimizer.grad_var)

    seen, again = left(run_mortal(4, body, Death(0, AVERAGE), Death(3, "the caller's")))
    assert seen[:2] == [(3, None), (2, None)]
    assert seen[2] == pytest.approx((2, *estimates(2, 4, 8)))
    assert again == seen[2]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_adascale(accumulate):
    def body(comm):
        (c, model), seen = slope(comm), []
        optimizer = hvdlocal.SynchronousOptimizer(
            sgd(model, 0.01),
            model,
            scaling=hvdlocal.AdaScale(smoothing=0.0),
            accumulate=accumulate,
            communicator=comm,
        )
        for _ in range(2 * accumulate):
            step(optimizer, model, c)
        seen = optimizer.grad_sqr, optimizer.grad_var, optimizer.gain, optimizer.num_workers
        return seen, weight(model)

    seen, end = left(run_mortal(4, body, Death(0, GRADIENTS, 2)))
    first, second = ([*slopes] * accumulate for slopes in ((1, 2, 4, 8), (2, 4, 8)))
    gains = [
        hvdlocal.gain_ratio(*estimates(*first), 4, 1, accumulate=accumulate),
        hvdlocal.gain_ratio(*estimates(*second), 3, 1, accumulate=accumulate),
    ]
    assert seen == pytest.approx((*estimates(*second), gains[1], 3), rel=1e-5)
    assert end == pytest.approx(5 - 0.01 * (gains[0] * 15 / 4 + gains[1] * 14 / 3), rel=1e-5)


# -- what is not finite --------------------------------------------------------------------------------------------------


def test_a_replica_that_is_not_finite_and_a_loss_in_one_round():
    def body(comm):
        own, (c, model) = comm.rank, slope(comm)
        optimizer = local(model, 1, communicator=comm)
        with pytest.raises(hvdlocal.NonFiniteError) as error:
            step(optimizer, model, math.nan if own == 3 else c)
        first = weight(model)
        step(optimizer, model, c)
        return str(error.value), first, weight(model)

    message, first, second = left(run_mortal(4, body, Death(0, AVERAGE)))
    # 5 minus the mean of 2 and 4; then 2 minus that of 2, 4 and 8. Ranks are numbered as in the job.
    assert message.startswith("NaN or infinity on rank 3 of 4 at progress 1.0 (gain 1): the model is now the average")
    assert (first, second) == pytest.approx((2.0, 2.0 - 14 / 3))


def test_a_rank_that_is_not_finite_and_dies_before_it_can_say_so():
    def body(comm):
        own, (c, model) = comm.rank, slope(comm)
        optimizer = local(model, 1, communicator=comm)
        with pytest.raises(
            hvdlocal.NonFiniteError, match="on a rank that is lost now, or in the sum over all ranks at"
        ):
            step(optimizer, model, math.nan if own == 1 else c)
        return weight(model), optimizer.num_workers

    assert left(run_mortal(3, body, Death(1, "hvdlocal.nonfinite"))) == (5 - 2.5, 2)


def test_a_loss_is_told_after_an_error():
    """At the end of the next step: this one has none."""

    def body(comm):
        own, (c, model) = comm.rank, slope(comm)
        told = []
        optimizer = local(model, 1, communicator=comm, on_loss=told.append)
        with pytest.raises(hvdlocal.NonFiniteError):
            step(optimizer, model, math.nan if own == 1 else c)
        before = ranks_of(told)
        step(optimizer, model, c)
        return before, ranks_of(told)

    assert left(run_mortal(3, body, Death(0, AVERAGE))) == ([], [(0,)])


def test_a_rank_that_differs_and_dies_before_it_can_say_so():
    def body(comm):
        own, (c, model) = comm.rank, slope(comm)
        optimizer = local(model, 1, communicator=comm)
        if own == 1:
            optimizer.param_groups[0]["lr"] = 0.5
        with pytest.raises(hvdlocal.DisagreementError, match="Ranks that are lost now differed"):
            step(optimizer, model, c)
        return "told"

    assert left(run_mortal(3, body, Death(1, "hvdlocal.differences"))) == "told"


def test_ranks_that_differ_are_told_by_their_numbers_in_the_job():
    def body(comm):
        own, (c, model) = comm.rank, slope(comm)
        optimizer = local(model, 1, communicator=comm)
        step(optimizer, model, c)
        if own == 3:
            optimizer.param_groups[0]["lr"] = 0.5
        with pytest.raises(hvdlocal.DisagreementError, match="Rank 3 of 4 "):
            step(optimizer, model, c)
        return "told"

    assert left(run_mortal(4, body, Death(0, AVERAGE))) == "told"


# -- buffers -------------------------------------------------------------------------------------------------------------


class Counted(Slope):
    """A slope with a buffer."""

    def __init__(self, value):
        super().__init__()
        self.register_buffer("own", torch.full((3,), value))


@pytest.mark.parametrize("poison", [False, True])
def test_averaged_buffers(poison):
    def body(comm):
        own, (c, _) = comm.rank, slope(comm)
        model = Counted(0.0)
        optimizer = local(model, 1, communicator=comm, buffers={"own": "average"})
        model.own.fill_(math.nan if poison and own == 2 else c)
        message = ""
        try:
            step(optimizer, model, c)
        except hvdlocal.NonFiniteError as error:
            message = str(error)
        return model.own.tolist(), weight(model), message.partition(":")[0], message[-200:].count("on rank 2")

    own, end, message, ranks = left(run_mortal(4, body, Death(0, AVERAGE)))
    # Ranks 1, 2 and 3 are left: buffers 2, 4, 8, or 2 and 8 if those of rank 2 are not finite. Weights move by 14/3.
    assert own == pytest.approx([5 if poison else 14 / 3] * 3)
    assert end == pytest.approx(5 - 14 / 3)
    assert (message, ranks) == (("NaN or infinity at progress 1.0 in averaged buffers", 1) if poison else ("", 0))


def test_buffers_of_a_rank_that_is_lost_while_their_average_is_under_way():
    def body(comm):
        own, (c, _) = comm.rank, slope(comm)
        model = Counted(0.0)
        optimizer = local(model, 2, communicator=comm, buffers={"own": "average"}, overlap=1)
        model.own.fill_(math.nan if own == 1 else c)
        for _ in range(2):
            step(optimizer, model, c)
        comm.gather(0, "the caller's")
        with pytest.raises(
            hvdlocal.NonFiniteError, match="in averaged buffers: 'own' on rank 1: they are now the average"
        ):
            step(optimizer, model, c)
        return model.own.tolist()

    # Those of ranks 0, 2 and 3 are averaged, although rank 3 is lost.
    assert left(run_mortal(4, body, Death(3, "the caller's"))) == pytest.approx([13 / 3] * 3)


def test_buffers_that_synchronize_averages():
    def body(comm):
        c, _ = slope(comm)
        model, told = Counted(0.0), []
        optimizer = hvdlocal.SynchronousOptimizer(
            sgd(model), model, buffers={"own": "average"}, communicator=comm, on_loss=told.append
        )
        model.own.fill_(c)
        optimizer.synchronize()
        return model.own.tolist(), ranks_of(told)

    # Rank 1 dies in the comparison, rank 3 in the average.
    deaths = Death(1, GRADIENTS), Death(3, "hvdlocal.buffers")
    assert left(run_mortal(4, body, *deaths)) == ([2.5] * 3, [(1,), (3,)])


def test_reestimated_statistics():
    def body(comm):
        c, _ = slope(comm)
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        optimizer = local(model, 1, communicator=comm, buffers="reestimate")
        optimizer.reestimate_buffers([torch.tensor([[c - 1], [c + 1]])])
        return model[0].running_mean.item(), optimizer.num_workers

    assert left(run_mortal(3, body, Death(0, "hvdlocal.buffers"))) == (3.0, 2)


def test_a_published_model_is_that_of_one_rank():
    """Rank 0 has sent its first buffer when it dies: then the model is wholly that of the new first rank."""

    def body(comm):
        c, _ = slope(comm)
        model = Counted(c)
        model.register_buffer("other", torch.full((2,), c))
        optimizer = local(model, 1, communicator=comm)
        model.own.fill_(c)
        model.other.fill_(c)
        with optimizer.published():
            published = model.own.tolist() + model.other.tolist()
        return published, model.own.tolist() + model.other.tolist() == [c] * 5

    # Ranks 1 and 2 have c = 2 and 4.
    assert left(run_mortal(3, body, Death(0, "hvdlocal.publish.1"))) == ([2.0] * 5, True)


def test_a_start_without_rank_0():
    """All ranks begin from the model of one rank also if rank 0 dies between two of its tensors."""

    def body(comm):
        c, _ = slope(comm)
        model, told = Counted(c), []
        with torch.no_grad():
            model.w.fill_(c)
        optimizer = local(model, 1, communicator=comm, on_loss=told.append)
        begun = weight(model), model.own.tolist(), optimizer.num_workers
        step(optimizer, model, c)
        return begun, weight(model), ranks_of(told)

    assert left(run_mortal(3, body, Death(0, "hvdlocal.start.own"))) == ((2, [2] * 3, 2), 2 - 3, [(0,)])


# -- state ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("synchronized", [True, False])
def test_a_state_after_a_loss_is_one_of_fewer_ranks(synchronized):
    """It continues with as many ranks as were left, also in the middle of a round, and with an average under way."""

    def optimizer_of(model, comm):
        return local(model, 3, communicator=comm, overlap=2)

    def body(comm):
        c, model = slope(comm)
        optimizer = optimizer_of(model, comm)
        for _ in range(7):
            step(optimizer, model, c)
        if synchronized:
            optimizer.synchronize()
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "c": c}
        saved["model"] = {name: tensor.clone() for name, tensor in saved["model"].items()}
        for _ in range(5):
            step(optimizer, model, c)
        optimizer.synchronize()
        return saved, weight(model)

    results = [result for result in run_mortal(4, body, Death(1, AVERAGE)) if result is not None]
    states = [saved["optimizer"]["hvdlocal"] for saved, _ in results]
    assert [(state["rank"], state["num_workers"]) for state in states] == [(0, 3), (1, 3), (2, 3)]

    def restarted(comm):
        saved, end = results[comm.rank]
        model = Slope()
        optimizer = optimizer_of(model, comm)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        for _ in range(5):
            step(optimizer, model, saved["c"])
        optimizer.synchronize()
        return weight(model) == end

    assert run_mortal(3, restarted) == [True] * 3


def test_the_clock():
    """As the trainer sets it after a loss: an epoch of 12 samples that has 3 steps of four ranks has 4 of three."""

    def body(comm):
        c, model = slope(comm)
        optimizer = local(model, 2, communicator=comm, budget=6)
        for _ in range(2):
            step(optimizer, model, c)
        optimizer.restart_clock(2 * 4 / 3, 8)
        periods = []
        while not optimizer.finished:
            step(optimizer, model, c)
            periods.append(optimizer.period)
        return optimizer.progress, optimizer.budget, periods, optimizer.in_sync

    progress, budget, periods, in_sync = left(run_mortal(4, body, Death(1, AVERAGE)))
    # 8/3 + 6 is the first that reaches 8.
    assert (progress, budget) == (pytest.approx(8 / 3 + 6), 8)
    assert periods == [2] * 6
    assert in_sync


def test_a_clock_without_an_end():
    optimizer = local(Slope(), budget=3, communicator=SingleProcess())
    optimizer.restart_clock(2.0, None)
    assert (optimizer.progress, optimizer.budget, optimizer.finished) == (2.0, None, False)
    with pytest.raises(ValueError, match="budget=-1"):
        optimizer.restart_clock(0.0, -1)
