"""A plan is what the optimizers do: the same steps, rounds, progress, collectives and bytes."""

import math
from types import SimpleNamespace

import pytest
import torch

from hvdlocal.averaging.islands import Islands
from hvdlocal.communicator import SingleProcess, StartedSum
from hvdlocal.communicator.islands import form_islands
from hvdlocal.models import build_model
from hvdlocal.plan.forecast import Checkpoints, Forecast
from hvdlocal.plan.payload import measure_payload
from hvdlocal.plan.run_plan import plan_run
from hvdlocal.training.accounting import RunTotals
from hvdlocal.training.config import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    OuterConfig,
    PeriodConfig,
    ScheduleConfig,
    TrainConfig,
)
from hvdlocal.training.optimizers import build_optimizer
from hvdlocal.training.run_length import run_length

SAMPLES, BATCH, RATIO = 1000, 10, 20.0


def images(shape):
    """Describes images of ten classes."""
    return SimpleNamespace(kind="images", shape=shape, classes=tuple("0123456789"))


def config(preset, epochs=3.0, schedule=None, model="digits_cnn", optimizer="sgd", evaluate=1.0, **method):
    return TrainConfig(
        data=DataConfig(path="x", batch_size=BATCH),
        model=ModelConfig(model),
        output="y",
        epochs=epochs,
        evaluate_every_epochs=evaluate,
        optimizer=OptimizerConfig(optimizer, lr=0.01),
        schedule=schedule or ScheduleConfig("cosine", warmup_epochs=0.3, final_lr=1e-4),
        method=MethodConfig(preset, **method),
    )


def sum_slices(islands, sent, name, start=Islands.start_sum_):
    """The sum across islands in a dry run, whose other ranks sum the other slices."""
    wait = start(islands, sent, name)

    def finish():
        wait()
        sent[sent.numel() // islands.inside.size :] *= islands.across.size

    return StartedSum(finish, wait.done)


def run(config, workers, monkeypatch, ratio=RATIO):
    """Trains on nothing, as Trainer does: rounds as (first step, H), the optimizer, collectives and bytes."""
    job = SingleProcess(workers)
    form_islands(job, config.method.island)
    monkeypatch.setattr(Islands, "start_sum_", sum_slices)
    torch.manual_seed(0)
    model = build_model(config.model.name, 10, (8, 8, 1))
    accumulate = config.method.period.period if config.method.preset.startswith("acc-") else config.method.accumulate
    length = run_length(config, SAMPLES / BATCH / workers, workers)
    optimizer = build_optimizer(config, model, length, job)
    monkeypatch.setattr(optimizer, "_update_statistics", lambda *_, **__: optimizer._smoothed.update(1.0, ratio, 0.0))
    totals = RunTotals(optimizer)
    rounds, steps, start = [], 0, 0
    evaluation = gap = config.evaluate_every_epochs * length.epoch
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    while not optimizer.finished:
        for group in optimizer.param_groups:
            group["lr"] = length.schedule(optimizer.progress)
        for _ in range(accumulate):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 1e-3)
            optimizer.step()
        steps += 1
        if not optimizer.round_under_way:
            rounds.append((start, steps - start))
            start = steps
            if optimizer.progress >= evaluation and not optimizer.finished:
                evaluation = (optimizer.progress // gap + 1) * gap
                optimizer.finish_average()
                with totals.beside_training():
                    optimizer.synchronize()
    return rounds, optimizer, length.epoch, totals


QSR = PeriodConfig("qsr", alpha=0.02, h_base=2)
CASES = {
    "local, constant": config("local", period=PeriodConfig(period=7)),
    "local, qsr": config("local", period=QSR),
    "local, qsr, a = 2": config("local", period=QSR, accumulate=2),
    "local, power, capped": config("local", period=PeriodConfig("power", 8, 0.03, 3, 1.0, max_period=9)),
    "local, post-local, steps": config(
        "local", 3.3, ScheduleConfig("step", step_epochs=1), period=PeriodConfig("post-local", 6, switch_epochs=1.1)
    ),
    "local, averaged moments and buffers": config("local", model="digits_cnn", momentum="average"),
    "local, moments at their own periods": config(
        "local",
        period=PeriodConfig(period=7),
        optimizer="adamw",
        momentum={"exp_avg": 3, "exp_avg_sq": 6},
        outer=OuterConfig("nesterov"),
    ),
    "local-ada-nostale, moments at their own periods": config(
        "local-ada-nostale", period=QSR, optimizer="adamw", momentum={"exp_avg": 2}
    ),
    "local-lin, qsr": config("local-lin", period=QSR),
    "local-lin, qsr of the base rate": config(
        "local-lin", period=PeriodConfig("qsr", alpha=0.02, h_base=2, rate="base")
    ),
    "local-ada, constant": config("local-ada", period=PeriodConfig(period=16)),
    "local-ada, qsr": config("local-ada", period=QSR),
    "local-ada, qsr, a = 3": config("local-ada", period=QSR, accumulate=3),
    "local-ada, exact": config("local-ada", period=PeriodConfig(period=3), statistics="exact"),
    "local-ada, c = 0": config("local-ada", period=QSR, c=0.0, sketch_size=64),
    "local-ada-nostale": config("local-ada-nostale", period=QSR),
    "islands, constant": config("local", period=PeriodConfig(period=7), island=2),
    "islands, local-lin, qsr": config("local-lin", period=QSR, island=2),
    "islands, local-ada, a = 3": config("local-ada", period=QSR, island=2, accumulate=3),
    "islands, local-ada, averaged moments": config("local-ada", island=4, momentum="average", statistics="exact"),
    "islands, outer optimizer": config("diloco", period=PeriodConfig(period=7), island=2),
    "one island, outer optimizer": config("diloco", period=PeriodConfig(period=7), island=4),
    "islands, an outer optimizer that changes nothing": config("slowmo", period=PeriodConfig(period=7), island=2),
    "islands, moments at their own periods": config(
        "local-ada", period=QSR, island=2, optimizer="adamw", momentum={"exp_avg": 1, "exp_avg_sq": 4}
    ),
    "islands, averaged inside, moments at their own periods": config(
        "local",
        period=PeriodConfig(period=7),
        island=2,
        island_period=2,
        optimizer="adamw",
        momentum={"exp_avg": 2, "exp_avg_sq": 4},
    ),
    "islands, local-ada-nostale": config("local-ada-nostale", period=QSR, island=2),
    "islands, averaged inside": config("local", period=PeriodConfig(period=7), island=2, island_period=2),
    "one island, averaged inside": config("local-lin", period=QSR, island=4, island_period=3, momentum="average"),
    "one island, local-ada-nostale": config("local-ada-nostale", island=4),
    "local-ada, overlap": config("local-ada", period=PeriodConfig(period=8), overlap=3),
    "local-ada, qsr, overlap of short rounds": config("local-ada", period=QSR, overlap=5, accumulate=2),
    "local-ada, overlap, evaluated after every round": config("local-ada", period=QSR, overlap=2, evaluate=0.01),
    "local-ada, mixed, exact": config(
        "local-ada", period=PeriodConfig(period=4), overlap=2, mixing=0.5, statistics="exact"
    ),
    "islands, local-ada, overlap": config("local-ada", period=QSR, island=2, overlap=2),
    "islands, averaged inside, overlap": config(
        "local", period=PeriodConfig(period=7), island=2, island_period=2, overlap=1
    ),
    "diloco": config("diloco", period=QSR),
    "islands, slowmo, overlap": config("slowmo", period=PeriodConfig(period=5), island=2, overlap=5),
    "acc-lin": config("acc-lin", period=PeriodConfig(period=3)),
    "acc-ada": config("acc-ada", period=PeriodConfig(period=3)),
    "sync": config("sync"),
    "sync, a = 2": config("sync", accumulate=2),
}


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_what_the_optimizer_does(name, workers, monkeypatch):
    case = CASES[name]
    if workers % case.method.island:
        pytest.skip(f"{workers} ranks are no islands of {case.method.island}")
    rounds, optimizer, epoch, totals = run(case, workers, monkeypatch)
    ratio = RATIO if "-ada" in case.method.preset else None
    plan = plan_run(case, SAMPLES, workers // case.method.island, grad_var_over_sqr=ratio)
    assert (plan.ranks, plan.num_workers) == (workers, optimizer.num_workers)
    planned = [(s.step + i * s.period, s.period) for s in plan.phases for i in range(s.rounds)]
    assert planned == rounds
    assert plan.steps == sum(period for _, period in rounds)
    assert plan.epochs * epoch == pytest.approx(optimizer.progress, rel=1e-12)
    assert plan.data_epochs == pytest.approx(plan.steps * optimizer.accumulate * workers * BATCH / SAMPLES)
    shape = {"island_size": plan.island_size, "islands": plan.num_workers}
    forecast = Forecast(name, plan, measure_payload(case, images((8, 8, 1)), **shape) if workers > 1 else None)
    assert plan.collectives == totals.collectives
    assert (forecast.bytes or 0, forecast.island_bytes or 0) == (totals.bytes_sent, totals.island_bytes_sent)


def test_payload_counts_what_the_arena_holds():
    """A ResNet-18: 11.2 M parameters, 20 batch norms with two running statistics each, and a sketch of 16,384."""
    shape = (32, 32, 3)
    model = build_model("resnet18_cifar", 10, shape)
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() for b in model.buffers() if b.is_floating_point())

    def elements(preset, **method):
        payload = measure_payload(config(preset, model="resnet18_cifar", **method), images(shape))
        assert payload.parameters == parameters
        assert payload.gradient == 4 * parameters
        return payload.round / 4

    padding = 16 * (len(list(model.parameters())) + 60)  # every tensor begins at a multiple of 64 bytes
    assert elements("sync") == pytest.approx(parameters, abs=padding)
    assert elements("local") == pytest.approx(parameters + buffers, abs=padding)
    assert elements("local", buffers="local") == pytest.approx(parameters, abs=padding)
    assert elements("local", momentum="average") == pytest.approx(2 * parameters + buffers, abs=2 * padding)
    assert elements("local-ada") == pytest.approx(parameters + buffers + 16384, abs=padding)
    assert elements("local-ada", statistics="exact") == pytest.approx(2 * parameters + buffers, abs=padding)


def test_memory_in_copies_of_the_parameters():
    """A flat buffer has one, and one for each averaged moment; overlap takes two more buffers, Nesterov φ and its momentum."""

    def memory(preset="local", islands=1, **method):
        case = config(preset, model="resnet18_cifar", optimizer="adamw", **method)
        return measure_payload(case, images((32, 32, 3)), island_size=islands).memory

    assert memory("sync") is None
    plain = memory()
    assert plain.copies == pytest.approx(1, rel=0.01)
    assert memory(momentum="average").copies == pytest.approx(3, rel=0.01)
    assert memory(momentum="average", overlap=4).copies == pytest.approx(9, rel=0.01)
    assert memory(overlap=1).overlap == 2 * plain.buffer
    assert memory("diloco").copies == pytest.approx(3, rel=0.01)
    assert memory("diloco", islands=4, island=4).outer == pytest.approx(0.5 * plain.parameters, rel=0.01)
    assert memory("slowmo") == plain, "for two workers its momentum is 0: plain averaging"
    assert memory("diloco", outer=OuterConfig(momentum=0.0)).copies == pytest.approx(2, rel=0.01)


def test_an_assumed_gain_divides_the_epochs_of_data():
    case = config("local-ada", epochs=30)
    at_one = plan_run(case, SAMPLES, 4)
    assert at_one.mean_gain == 1
    assert at_one.data_epochs == pytest.approx(4 * 30)
    # The first round, before there is an estimate, has gain 1.
    assert plan_run(case, SAMPLES, 4, gain=3.0).data_epochs == pytest.approx(4 * 30 / 3, rel=0.01)


def test_epochs_of_data_with_every_tail():
    """1,000 images in global batches of 48: 20.8 steps with the rest carried over, 21 with a small batch, 20 without it."""
    for tail, steps in (("carry", 1000 / 48), ("partial", 21), ("drop", 20)):
        case = config("sync", epochs=6)
        case.data.batch_size, case.data.tail = 12, tail
        assert plan_run(case, 1000, 4).steps == math.ceil(6 * steps)


def test_longest_round():
    plan = plan_run(config("local", period=QSR), SAMPLES, 2)
    assert plan.longest.period == max(phase.period for phase in plan.phases)
    assert plan.phase_at(plan.longest.epoch) == plan.longest
    assert plan.phase_at(0) == plan.phases[0]


@pytest.mark.parametrize(
    ("case", "assumptions", "message"),
    [
        (config("local", period=PeriodConfig("adacomm")), {}, "AdaComm depends on the training loss"),
        (config("local"), {"gain": 2.0}, "nothing to assume"),
        (config("sync"), {"grad_var_over_sqr": 2.0}, "nothing to assume"),
        (config("local-ada"), {"gain": 2.0, "grad_var_over_sqr": 2.0}, "not both"),
        (config("local-ada"), {"gain": 0.0}, "must be positive"),
        (config("local-ada"), {"grad_var_over_sqr": -1.0}, "must not be negative"),
        (config("local", epochs=-1), {}, "epochs=-1"),
    ],
)
def test_mistakes(case, assumptions, message):
    with pytest.raises(ValueError, match=message):
        plan_run(case, SAMPLES, 2, **assumptions)


def test_spacing_of_checkpoints():
    """Against the loss that it should minimise: cost / T + T / (2 · time between failures)."""
    best = Checkpoints.best(cost_seconds=10, failure_hours=24)
    assert best.seconds == pytest.approx(math.sqrt(2 * 10 * 86400))
    around = [10 / seconds + seconds / (2 * 86400) for seconds in (best.seconds / 1.1, best.seconds * 1.1)]
    assert best.lost_share < min(around)
    with pytest.raises(ValueError, match="must be positive"):
        Checkpoints.best(0, 24)
