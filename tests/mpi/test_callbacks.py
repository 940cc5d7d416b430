"""Callbacks on several ranks: who is called, and what an error on one of them does to the others."""

import sys

import pytest
from support.configs import digits_config

import hvdlocal
from hvdlocal.communicator import DisagreementError, SetupError
from hvdlocal.training import CallbackError, Trainer
from hvdlocal.training.config import MethodConfig, PeriodConfig


@pytest.fixture
def trainer(comm, place, request):
    """Builds the trainer of a small run in rounds of two steps."""

    def trainer(*callbacks, **settings):
        output = place / request.node.name
        method = MethodConfig("local", PeriodConfig(period=2))
        config = digits_config(place / "data", output, data_batch_size=8, method=method, **settings)
        return Trainer(config, comm, callbacks=callbacks)

    return trainer


class Rounds(hvdlocal.Callback):
    def __init__(self):
        self.rounds, self.outcome, self.summary = [], None, None

    def on_round(self, run, record):
        self.rounds.append((run.rank, record["round"]))

    def on_end(self, run, outcome, summary):
        self.outcome, self.summary = outcome, summary


class RoundsOfAll(Rounds):
    all_ranks = True


def test_rank_0_or_all(comm, trainer):
    first, everywhere = Rounds(), RoundsOfAll()
    summary = trainer(first, everywhere, epochs=1.0).run()
    expected = [(comm.rank, number) for number in range(1, summary.rounds + 1)]
    assert everywhere.rounds == expected
    assert first.rounds == (expected if comm.rank == 0 else [])
    assert everywhere.outcome == "finished"
    assert (everywhere.summary is not None) == (comm.rank == 0)


class FailsOnTheLastRank(RoundsOfAll):
    def on_round(self, run, record):
        super().on_round(run, record)
        if record["round"] == 2 and run.rank == run.num_workers - 1:
            raise RuntimeError("no such figure")


def test_an_error_on_one_rank_ends_all_with_a_checkpoint(comm, trainer):
    callback = FailsOnTheLastRank()
    run = trainer(callback, epochs=1000.0)
    with pytest.raises(CallbackError) as failed:
        run.run()
    told = str(failed.value)
    assert told.startswith("callback FailsOnTheLastRank, on_round after step 4: RuntimeError: no such figure (in ")
    assert comm.size == 1 or f"(rank {comm.size - 1} of {comm.size})" in told
    assert comm.gather(told, "test.told") == [told] * comm.size
    assert "the same command continues from the checkpoint of step" in told
    assert callback.outcome == (None if comm.rank == comm.size - 1 else "interrupted")


class FailsWhenMade(hvdlocal.Callback):
    all_ranks = True

    def __init__(self):
        raise OSError("no licence")


def test_a_constructor_fails_on_all_ranks_before_training(comm, trainer, place, request):
    kind = SetupError if comm.size > 1 else ValueError
    with pytest.raises(kind, match="OSError: no licence"):
        trainer(callbacks=[f"{__name__}:FailsWhenMade"])
    assert not (place / request.node.name).exists()


def test_ranks_with_different_callbacks(comm, trainer):
    mine = [] if comm.rank and comm.rank == comm.size - 1 else [RoundsOfAll()]
    if comm.size == 1:
        trainer(*mine, epochs=1.0).run()
        return
    with pytest.raises(
        DisagreementError, match=rf"callbacks: rank {comm.size - 1} has \[\], rank 0 has \['RoundsOfAll'\]"
    ):
        trainer(*mine)


def test_ranks_with_other_code_of_a_callback(comm, trainer, tmp_path, monkeypatch):
    code = f"import hvdlocal\n\nclass Mine(hvdlocal.Callback):\n    rank = {min(comm.rank, 1)}\n"
    (tmp_path / "callback_of_rank.py").write_text(code)  # tmp_path is each rank's own
    monkeypatch.syspath_prepend(tmp_path)
    try:
        if comm.size == 1:
            trainer(callbacks=["callback_of_rank:Mine"], epochs=1.0).run()
            return
        with pytest.raises(DisagreementError, match=r"code of callback_of_rank: rank 1 has .*, rank 0 has "):
            trainer(callbacks=["callback_of_rank:Mine"])
    finally:
        sys.modules.pop("callback_of_rank", None)
