"""What a run's records say of other methods."""

from types import SimpleNamespace

import pytest

from hvdlocal.communicator import SingleProcess
from hvdlocal.communicator.islands import form_islands
from hvdlocal.training.accounting import RunTotals
from hvdlocal.training.metrics import NoMetrics
from hvdlocal.training.recorder import Recorder


def parts(communicator):
    """An optimizer, a state and a session without anything in them."""
    optimizer = SimpleNamespace(
        accumulate=3,
        progress=0.0,
        seconds_averaging=0.0,
        seconds_inside=0.0,
        seconds_hidden=0.0,
        communicator=communicator,
    )
    state = SimpleNamespace(totals=RunTotals(optimizer), loader=SimpleNamespace(stats=lambda: {"samples": 0}))
    session = SimpleNamespace(
        length=SimpleNamespace(epoch=1.0, budget=1.0), parameters=25, communicator=SimpleNamespace(job_size=2)
    )
    return optimizer, state, session


def test_data_parallelism_would_average_every_micro_batch():
    recorder = Recorder(NoMetrics(), *parts(SingleProcess()))
    assert recorder.data_parallel_bytes(5) == 1500


def test_a_round_counts_from_the_end_of_the_one_before():
    """Also through a checkpoint in its middle."""
    communicator = SingleProcess()
    optimizer, state, _ = parts(communicator)
    totals = state.totals
    communicator.traffic.bytes, optimizer.seconds_averaging = 100, 1.0
    assert {"round_averaging_seconds": 1.0, "round_bytes_sent": 100}.items() <= totals.end_round().items()
    communicator.traffic.bytes, optimizer.seconds_averaging = 130, 1.5
    saved = totals.state_dict()
    resumed = RunTotals(optimizer)
    resumed.load_state_dict(saved)
    resumed.start()
    communicator.traffic.bytes, optimizer.seconds_averaging = 200, 4.0
    taken = resumed.end_round()
    assert (taken["round_averaging_seconds"], taken["round_bytes_sent"]) == (3.0, 100)
    assert resumed.end_round()["round_bytes_sent"] == 0


def test_what_stays_inside_an_island_is_counted_apart():
    communicator = SingleProcess(8)
    form_islands(communicator, 4)
    optimizer, state, _ = parts(communicator)
    inside, across = communicator.island.traffic, communicator.peers.traffic
    communicator.traffic.bytes += 10
    inside.bytes, inside.collectives, optimizer.seconds_inside = 100, 7, 2.0
    across.bytes, across.collectives = 25, 3
    state.totals.waited(0.5)
    assert (state.totals.bytes_sent, state.totals.collectives, state.totals.island_bytes_sent) == (35, 3, 100)
    assert state.totals.inside_islands == state.totals.seconds()["inside_islands"] == 2.0
    taken = state.totals.end_round()
    assert (taken["round_bytes_sent"], taken["round_island_bytes_sent"], taken["round_island_seconds"]) == (35, 100, 2)
    with state.totals.beside_training():
        inside.bytes += 1000
    resumed = RunTotals(optimizer)
    resumed.load_state_dict(state.totals.state_dict())
    resumed.start()
    inside.bytes, optimizer.seconds_inside = inside.bytes + 5, 3.0
    taken = resumed.end_round()
    assert (taken["round_bytes_sent"], taken["round_island_bytes_sent"], taken["round_island_seconds"]) == (0, 5, 1)


def test_hidden_averages_take_no_time_of_their_own():
    """Also through a checkpoint."""
    optimizer, state, _ = parts(SingleProcess())
    totals = state.totals
    optimizer.seconds_averaging, optimizer.seconds_hidden = 1.0, 2.5
    with totals.beside_training():
        optimizer.seconds_averaging = 5.0
    seconds = totals.seconds()
    assert (seconds["averaging"], seconds["hidden"]) == (1.0, 2.5)
    assert sum(seconds.values()) == pytest.approx(2 * seconds["elapsed"] + 2.5)
    assert totals.end_round()["round_hidden_seconds"] == 2.5
    optimizer.seconds_hidden = 3.0
    resumed = RunTotals(optimizer)
    resumed.load_state_dict(totals.state_dict())
    resumed.start()
    optimizer.seconds_hidden = 4.0
    assert resumed.seconds()["hidden"] == 4.0
    assert resumed.end_round()["round_hidden_seconds"] == 1.5


def test_a_checkpoint_from_before_there_was_overlap():
    _, state, _ = parts(SingleProcess())
    saved = state.totals.state_dict() | {"round_began": (0.0, 0.0, 0, 0.0, 0)}
    del saved["hidden"]
    state.totals.load_state_dict(saved)
    state.totals.start()
    assert state.totals.end_round()["round_hidden_seconds"] == state.totals.hidden == 0


def test_a_checkpoint_from_before_there_were_islands():
    _, state, _ = parts(SingleProcess())
    saved = state.totals.state_dict() | {"bytes_sent": 70, "round_began": (1.0, 0.5, 50)}
    del saved["inside_islands"], saved["island_bytes_sent"]
    state.totals.load_state_dict(saved)
    state.totals.start()
    taken = state.totals.end_round()
    assert (taken["round_bytes_sent"], taken["round_island_bytes_sent"], taken["round_island_seconds"]) == (20, 0, 0)


def test_a_checkpoint_without_the_beginning_of_its_round():
    _, state, _ = parts(SingleProcess())
    saved = state.totals.state_dict() | {"bytes_sent": 70}
    del saved["round_began"]
    state.totals.load_state_dict(saved)
    state.totals.start()
    assert state.totals.end_round()["round_bytes_sent"] == 0
