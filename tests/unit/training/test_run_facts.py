"""What a run is, in the lines before training."""

from dataclasses import replace

import pytest

from hvdlocal.training.config import MethodConfig, OuterConfig, PeriodConfig
from hvdlocal.training.optimizers import build_outer
from hvdlocal.training.rules import describe_method
from hvdlocal.training.run_facts import RunFacts, describe_averages


def facts(**changes):
    given = {
        "task": "image-classification",
        "model": "digits_cnn",
        "parameters": 16_202,
        "data": "data/digits",
        "data_kind": "images",
        "training_samples": 1501,
        "test_samples": 296,
        "storage": "ram: as asked for",
        "preset": "local-ada",
        "method": "local-ada constant H=4",
        "rule": "constant",
        "period": 4,
        "accumulate": 1,
        "batch_size": 32,
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "schedule": "cosine",
        "epochs": 24.0,
        "steps_at_gain_1": 1128,
        "seed": 0,
        "precision": "float32",
        "device": "cpu",
        "engine": "horovod",
        "threads": 2,
        "ranks": 16,
        "hosts": 4,
        "island_size": 1,
        "num_workers": 16,
        "averages": None,
        "version": "0.1.0",
        "output": "runs/digits",
    }
    return RunFacts(**(given | changes))


def test_the_header():
    assert facts().header() == [
        "hvdlocal 0.1.0: image-classification",
        "  model      digits_cnn, 16,202 parameters",
        "  data       data/digits: 1,501 training and 296 test samples (images)",
        "  storage    ram: as asked for",
        "  method     local-ada constant H=4; sgd, γ = 0.05, cosine",
        "  ranks      16 on 4 hosts, horovod",
        "  computing  cpu, float32, 2 CPU threads per rank",
        "  length     24 epochs, 1,128 steps at gain 1; batches of 32 per rank",
        "  output     runs/digits",
    ]
    assert all(len(line) <= 80 for line in facts().header())


def test_islands_are_the_workers():
    assert facts(island_size=4, num_workers=4).header()[5] == (
        "  ranks      16 on 4 hosts, horovod: 4 islands of 4, so K = 4"
    )
    assert facts(island_size=16, num_workers=1).header()[5] == (
        "  ranks      16 on 4 hosts, horovod: 1 island of 16, so nothing is averaged between workers"
    )


def test_one_rank_says_so(monkeypatch):
    monkeypatch.setattr("hvdlocal.training.run_facts.launched_rank", lambda: None)
    ranks = facts(ranks=1, hosts=1).header()[5]
    assert ranks == "  ranks      1, so nothing is averaged between ranks; `mpirun -np N hvdlocal train …` starts more"
    monkeypatch.setattr("hvdlocal.training.run_facts.launched_rank", lambda: 0)
    assert facts(ranks=1, hosts=1).header()[5] == "  ranks      1, so nothing is averaged between ranks"


def test_numbers_and_their_nouns():
    lines = facts(epochs=0.5, steps_at_gain_1=1, accumulate=4, threads=1, hosts=1).header()
    assert lines[5] == "  ranks      16 on 1 host, horovod"
    assert lines[6] == "  computing  cpu, float32, 1 CPU thread per rank"
    assert lines[7] == "  length     0.5 epochs, 1 step at gain 1; batches of 32 × 4 per rank"


@pytest.mark.parametrize(
    ("preset", "period", "words"),
    [
        ("local-ada", {"period": 4}, "local-ada constant H=4"),
        (
            "local",
            {"rule": "qsr", "alpha": 0.2, "h_base": 4, "max_period": 64},
            "local qsr alpha=0.2 h_base=4 max_period=64",
        ),
        ("local", {"rule": "post-local", "switch_epochs": 3, "period": 8}, "local post-local H=8 switch_epochs=3"),
        ("acc-ada", {"period": 8}, "acc-ada 8 micro-batches"),
        ("sync", {"period": 8}, "sync"),
    ],
)
def test_the_method_in_words(preset, period, words):
    assert describe_method(MethodConfig(preset=preset, period=PeriodConfig(**period))) == words


def test_what_becomes_of_the_mean_in_words():
    method = MethodConfig(
        "diloco",
        PeriodConfig(period=8),
        momentum={"exp_avg": 3, "exp_avg_sq": 6},
        outer=OuterConfig(lr=0.5, normalize=True),
        overlap=2,
        mixing=0.5,
    )
    assert describe_method(method) == (
        "diloco constant H=8 outer.lr=0.5 outer.normalize=true overlap=2 mixing=0.5 momentum={exp_avg: 3, exp_avg_sq: 6}"
    )
    assert describe_method(replace(method, preset="sync")) == "sync"
    without = MethodConfig("local", outer=OuterConfig("none", lr=0.5))
    assert describe_method(without) == "local constant H=8"


@pytest.mark.parametrize(
    ("method", "workers", "words"),
    [
        (MethodConfig("local"), 16, None),
        (MethodConfig("local", outer=OuterConfig("none", momentum=0.5)), 16, None),
        (MethodConfig("diloco"), 2, "the outer optimizer nesterov (lr 0.7, momentum 0.5) steps on each"),
        (
            MethodConfig("slowmo"),
            2,
            "the outer optimizer slowmo (lr 1, momentum 0, normalised by the round's rates) steps on each, which is plain "
            "averaging",
        ),
        (
            MethodConfig("slowmo", outer=OuterConfig(lr=0.5), overlap=1),
            8,
            "the outer optimizer slowmo (lr 0.5, momentum 0.5, normalised by the round's rates) steps on each; applied 1 step "
            "later, steps carried over",
        ),
        (
            MethodConfig("local", overlap=3, mixing=0.5, momentum={"exp_avg": 1, "exp_avg_sq": 6}),
            8,
            "applied 3 steps later, steps mixed in with α = 0.5; moments: exp_avg in every round, exp_avg_sq in 1 of 6 rounds",
        ),
        (MethodConfig("local", momentum="reset"), 8, "moments set to 0"),
    ],
)
def test_what_becomes_of_an_average(method, workers, words):
    found = describe_averages(method, build_outer(method, workers))
    assert found == words
    lines = facts(averages=found).header()
    assert (f"  averages   {words}" in lines) is (words is not None)


@pytest.mark.parametrize(
    ("workers", "momentum"), [(1, 0.0), (3, 0.0), (4, 0.2), (8, 0.5), (15, 0.5), (16, 0.6), (99, 0.6)]
)
def test_slowmo_suits_the_number_of_workers(workers, momentum):
    assert build_outer(MethodConfig("slowmo"), workers).momentum == momentum
    given = MethodConfig("local", outer=OuterConfig("slowmo", momentum=0.3))
    assert build_outer(given, workers).momentum == 0.3


def test_islands_in_words():
    method = MethodConfig("local", PeriodConfig(period=8), island="node", island_period=2)
    assert describe_method(method) == "local constant H=8 island=node island_period=2"
