"""Which samples an epoch holds, in which order, for any number of ranks."""

import numpy as np
import pytest
from loaders import global_batches, loaders, sequence, source_index

from hvdlocal.data import CropFlip, Loader, evaluation_batches
from hvdlocal.data.load.order import EpochOrder, epoch_permutation, replacement_draws

ORDERS = ["global", "block", "replacement"]


TAILS = ["carry", "partial", "drop"]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 8])
def test_epochs_hold_what_they_should(make_dataset, num_workers, tail, order):
    n = 101  # prime: no global batch divides it
    dataset = make_dataset(n, num_shards=3)
    ranks = loaders(dataset, num_workers, batch_size=4, seed=6, order=order, tail=tail)
    global_batch = 4 * num_workers
    used = n - n % global_batch if tail == "drop" else n
    assert {loader.samples_per_epoch for loader in ranks} == {used}
    full, rest = divmod(n, global_batch)
    steps_per_epoch = full + (rest >= num_workers) if tail == "partial" else used / global_batch
    assert {loader.steps_per_epoch for loader in ranks} == {steps_per_epoch}

    batches = sequence(ranks, -(-3 * used // global_batch) + 3)
    sizes = [len(batch) for batch in batches]
    if tail == "partial":
        last = [rest] if rest >= num_workers else []
        expected = [global_batch] * full + last
        expected[-1] += 0 if last else rest
        assert sizes[: int(steps_per_epoch)] == expected
    else:
        assert set(sizes) == {global_batch}
    seen = np.concatenate(batches)[: 3 * used].reshape(3, used)
    epoch_order = EpochOrder(order, 6, n, block_starts=dataset.block_starts)
    for epoch in range(3):
        np.testing.assert_array_equal(seen[epoch], dataset.index[epoch_order(epoch)[:used]])
        if order != "replacement":
            assert len(set(seen[epoch])) == used


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 8])
def test_carry_gives_every_sample_once_per_epoch(make_dataset, num_workers):
    n = 101
    ranks = loaders(make_dataset(n, num_shards=3), num_workers, batch_size=4, seed=6)
    steps = -(-3 * n // (4 * num_workers))
    seen = global_batches(ranks, steps).ravel()
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(seen[epoch * n : (epoch + 1) * n]), np.arange(n))


def test_global_batches_do_not_depend_on_the_number_of_workers(make_dataset):
    dataset = make_dataset(101, num_shards=2)
    expected = global_batches(loaders(dataset, 1, 24), 12)
    order = np.concatenate([epoch_permutation(0, epoch, 101) for epoch in range(3)])
    np.testing.assert_array_equal(expected.ravel(), dataset.index[order[: 12 * 24]])
    for num_workers in (2, 3, 8, 24):
        np.testing.assert_array_equal(global_batches(loaders(dataset, num_workers, 24 // num_workers), 12), expected)


def test_drop_leaves_out_the_rest(make_dataset):
    dataset = make_dataset(23)
    ranks = loaders(dataset, 2, 3, tail="drop")
    assert ranks[0].steps_per_epoch == 3
    seen = global_batches(ranks, 6).reshape(2, 18)
    for epoch in range(2):
        np.testing.assert_array_equal(seen[epoch], dataset.index[epoch_permutation(0, epoch, 23)[:18]])
    assert ranks[0].epoch == 2.0


def test_for_loops_walk_on_from_edge_to_edge(make_dataset):
    loader = Loader(make_dataset(23), 5)
    lengths, epochs = [], []
    for _ in range(5):
        lengths.append(sum(1 for _ in loader))
        epochs.append(loader.epoch)
    assert lengths == [5, 5, 4, 5, 4]  # the edges 23, 46, 69, 92, 115 are crossed at 25, 50, 70, 95, 115
    assert epochs == [25 / 23, 50 / 23, 70 / 23, 95 / 23, 5.0]
    assert loader.steps_per_epoch == 23 / 5


def test_batch_larger_than_the_data_set(make_dataset):
    loader = Loader(make_dataset(5), 12)
    images, _ = next(iter(loader))
    counts = np.bincount(source_index(images), minlength=5)
    assert set(counts) <= {2, 3}
    assert counts.sum() == 12


def test_replacement_follows_its_draws(make_dataset):
    dataset = make_dataset(50)
    batches = global_batches([Loader(dataset, 10, order="replacement", seed=3)], 10).reshape(2, 50)
    for epoch in range(2):
        np.testing.assert_array_equal(batches[epoch], dataset.index[replacement_draws(3, epoch, 50)])


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 8, 12])
def test_evaluation_sees_every_sample_once(make_dataset, source, num_workers):
    dataset = make_dataset(11, num_shards=2)
    per_rank = []
    for rank in range(num_workers):
        batches = list(evaluation_batches(dataset, 2, rank=rank, num_workers=num_workers))
        indices = [source_index(images) for images, _ in batches]
        for index, (_, labels) in zip(indices, batches, strict=True):
            np.testing.assert_array_equal(labels, source(11)[1][index])
        per_rank.append(np.concatenate([*indices, np.empty(0, np.int64)]))
    assert max(map(len, per_rank)) - min(map(len, per_rank)) <= 1
    np.testing.assert_array_equal(np.concatenate(per_rank), dataset.index)


def test_partial_epochs_end_at_their_edge_on_every_rank(make_dataset):
    dataset = make_dataset(29)
    ranks = loaders(dataset, 4, 2, tail="partial", transform=CropFlip(dataset.mean, dataset.std, padding=1))
    for epoch in range(3):
        lengths = [[len(labels) for _, labels in loader] for loader in ranks]
        assert lengths == [[2, 2, 2, 2], [2, 2, 2, 1], [2, 2, 2, 1], [2, 2, 2, 1]]
        assert {loader.epoch for loader in ranks} == {epoch + 1}


def test_partial_leaves_no_rank_without_a_sample(make_dataset):
    dataset = make_dataset(26)  # two samples are left over for four ranks: the batch before takes them
    ranks = loaders(dataset, 4, 2, tail="partial")
    assert [[len(labels) for _, labels in loader] for loader in ranks] == [[2, 2, 3], [2, 2, 3], [2, 2, 2], [2, 2, 2]]
    assert {loader.steps_per_epoch for loader in ranks} == {3}
    with pytest.raises(ValueError, match="26 samples are fewer than the 27 ranks"):
        Loader(dataset, 1, num_workers=27, tail="partial")
