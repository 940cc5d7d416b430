"""A language model on any number of ranks: it learns, and its bits per byte are exact."""

import math

import numpy as np
import pytest
from support.records import records

import hvdlocal
from hvdlocal.training import Trainer
from hvdlocal.training.config import DataConfig, MethodConfig, ModelConfig, OptimizerConfig, PeriodConfig, TrainConfig

T = 8


@pytest.fixture
def text(place, comm):
    """A text of period five: after its first token, everything in it can be predicted."""
    for split, length in (("train", 1200), ("test", 301)):
        writer = hvdlocal.TokenWriter(place / "text", split, communicator=comm)
        writer.write((np.arange(length) % 5).astype(np.uint8), np.array([1, 2, 3, 4, 5]), block=T)
    return place / "text"


def configuration(text, output, **settings):
    return TrainConfig(
        data=DataConfig(str(text), batch_size=4),
        model=ModelConfig("gpt", arguments={"layers": 1, "heads": 2, "width": 16}),
        output=str(output),
        task="language-model",
        optimizer=OptimizerConfig("adamw", lr=0.01),
        method=MethodConfig("local", PeriodConfig(period=3)),
        epochs=4,
        evaluate_every_epochs=4,
        **settings,
    )


def test_it_learns_and_counts_bits_per_byte(text, place, comm):
    Trainer(configuration(text, place / "out"), comm).run()
    comm.barrier("test.records")  # rank 0 writes them
    last = records(place / "out", "evaluation")[-1]
    assert last["loss"] < 0.2
    bytes_per_token = 3  # of the 300 tokens that are predicted, 60 of each of 1 to 5 bytes
    assert last["bits_per_byte"] == pytest.approx(last["loss"] / math.log(2) / bytes_per_token, rel=1e-6)
