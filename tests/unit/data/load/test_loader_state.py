"""A loader goes on where its state was taken, with any number of ranks."""

import time

import numpy as np
import pytest
from loaders import global_batches, loaders, sequence

from hvdlocal.data import Loader

ORDERS = ["global", "block", "replacement"]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("tail", "resumed_with"),
    [
        ("carry", [(2, 3), (3, 2), (1, 5), (5, 1)]),
        ("partial", [(2, 3), (3, 2), (1, 5), (8, 1)]),
        ("drop", [(2, 3), (3, 2), (1, 6)]),
    ],
)
def test_resume_at_every_step_with_other_ranks(make_dataset, order, tail, resumed_with):
    dataset = make_dataset(23, num_shards=2)
    options = {"order": order, "tail": tail, "seed": 5}
    expected = np.concatenate(sequence(loaders(dataset, 2, 3, **options), 16))
    uninterrupted = Loader(dataset, 3, num_workers=2, **options)
    batches = uninterrupted.endless()
    for _ in range(8):  # two epochs of four steps
        state = uninterrupted.state_dict()
        for num_workers, batch_size in resumed_with:
            resumed = loaders(dataset, num_workers, batch_size, **options)
            for loader in resumed:
                loader.load_state_dict(state)
            rest = np.concatenate(sequence(resumed, 4))
            done = state["samples_consumed"]
            np.testing.assert_array_equal(rest, expected[done : done + len(rest)])
            assert {loader.samples_consumed for loader in resumed} == {done + len(rest)}
        next(batches)


def test_partial_goes_on_where_more_ranks_than_samples_are_left(make_dataset):
    dataset = make_dataset(23)
    state = Loader(dataset, 3, num_workers=2, tail="partial", seed=5).state_dict() | {"samples_consumed": 18}
    ranks = loaders(dataset, 8, 1, tail="partial", seed=5)
    for loader in ranks:
        loader.load_state_dict(state)
    first = [len(next(loader.endless())[1]) for loader in ranks]
    assert sum(first) == 5 + 8
    assert {loader.samples_consumed for loader in ranks} == {18 + 13}


@pytest.mark.parametrize(("num_workers", "batch_size"), [(2, 3), (3, 2), (1, 6)])
def test_resume_at_every_step(make_dataset, num_workers, batch_size):
    dataset = make_dataset(23, num_shards=2)
    expected = global_batches(loaders(dataset, 2, 3), 11)
    uninterrupted = Loader(dataset, 3, num_workers=2)
    batches = uninterrupted.endless()
    for done in range(11):
        resumed = loaders(dataset, num_workers, batch_size)
        for loader in resumed:
            loader.load_state_dict(uninterrupted.state_dict())
        np.testing.assert_array_equal(global_batches(resumed, 11 - done), expected[done:])
        next(batches)


def test_only_what_was_handed_out_counts(make_dataset):
    loader = Loader(make_dataset(50), 4, num_workers=2, prefetch=5)
    batches = loader.endless()
    assert loader.samples_consumed == 0
    for step in range(3):
        next(batches)
        time.sleep(0.01)  # the thread runs ahead
        assert loader.samples_consumed == (step + 1) * 8
    assert loader.state_dict()["samples_consumed"] == 24
    stats = loader.stats()
    assert (stats["samples"], stats["bytes"]) == (12, 12 * 24)
    assert stats["wait_seconds"] > 0


def test_state_of_another_run_is_refused(make_dataset, tmp_path):
    dataset = make_dataset(50)
    state = Loader(dataset, 4).state_dict()
    with pytest.raises(ValueError, match="saved with seed 0, this loader has 1"):
        Loader(dataset, 4, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with samples_per_epoch 50, this loader has 48"):
        Loader(dataset, 4, tail="drop").load_state_dict(state)
    with pytest.raises(ValueError, match="saved with order global, this loader has block"):
        Loader(dataset, 4, order="block").load_state_dict(state)
    with pytest.raises(ValueError, match="saved with tail carry, this loader has partial"):
        Loader(dataset, 4, tail="partial").load_state_dict(state)
    blocked = Loader(dataset, 4, order="block")
    with pytest.raises(ValueError, match="saved with streams 2, this loader has 1"):
        blocked.load_state_dict(blocked.state_dict() | {"streams": 2})
    with pytest.raises(ValueError, match="saved with window 9, this loader has 8"):
        blocked.load_state_dict(blocked.state_dict() | {"window": 9})
    with pytest.raises(ValueError, match="saved with fingerprint abc"):
        Loader(dataset, 4).load_state_dict(state | {"fingerprint": "abc"})
    with pytest.raises(ValueError, match="saved with version None"):
        Loader(dataset, 4).load_state_dict({})


@pytest.mark.parametrize("consumed", [-1, 1.5, "3", None])
def test_states_without_a_usable_cursor_are_refused(make_dataset, consumed):
    loader = Loader(make_dataset(20), 4)
    state = loader.state_dict()
    for broken in (state | {"samples_consumed": consumed}, {k: v for k, v in state.items() if k != "samples_consumed"}):
        with pytest.raises(ValueError, match="the loader's state has samples_consumed"):
            loader.load_state_dict(broken)
    loader.load_state_dict(state | {"samples_consumed": np.int64(8)})
    assert loader.samples_consumed == 8


def test_only_the_latest_iteration_is_valid(make_dataset):
    loader = Loader(make_dataset(50), 4)
    first = iter(loader)
    next(first)
    second = loader.endless()
    next(second)
    with pytest.raises(RuntimeError, match="a later one was begun"):
        next(first)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(RuntimeError, match="a state was loaded"):
        next(second)
    assert loader.samples_consumed == 8
