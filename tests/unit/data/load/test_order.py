import hashlib

import numpy as np
import pytest

from hvdlocal.data.load.order import (
    EpochOrder,
    SampleSequence,
    block_permutation,
    default_streams,
    epoch_permutation,
    replacement_draws,
)
from hvdlocal.data.permutations import pre_shuffle
from hvdlocal.data.random_keys import sample_keys, splitmix64


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.astype("<i8").tobytes()).hexdigest()


def blocks_of(n: int, length: int = 64) -> np.ndarray:
    return np.arange(0, n, length)


def test_golden_orders():
    # A checkpoint means nothing without these: they must never change within format version 1.
    n = 50_037
    blocked = block_permutation(7, 3, n, blocks_of(n), streams=64, window=8)
    assert sha256(blocked) == "86f21e72c1f88cda8cca3bbd0bd538191fae6411f47e5617a2c8d501388be3db"
    assert sha256(replacement_draws(7, 3, n)) == "f27f33ef913b3a0e9d393a5fb4fc75cfaf8024e715e6a85eb54eb88f4dd8c149"
    assert replacement_draws(0, 0, 10).tolist() == [4, 6, 4, 4, 3, 0, 0, 9, 5, 8]
    assert block_permutation(0, 0, 10, blocks_of(10, 3), streams=2, window=1).tolist() == [6, 5, 7, 9, 8, 0, 4, 2, 3, 1]
    assert epoch_permutation(0, 0, 10).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert sha256(epoch_permutation(7, 3, 50_037)) == "0747e8666d3638fff44524eaa3c98148cb26c8414cfb6734b07f9ab9e49bc838"
    assert sha256(pre_shuffle(7, 50_037)) == "05eec2254a51264d1264b3d2df511608d60a578280addb6ed9ff52d7db7c6343"


def test_order_is_a_sort_by_philox_keys():
    n, bits = 1000, 10
    raw = np.random.Philox(key=np.array([5, 2 << 8 | 1], np.uint64)).random_raw(n).tolist()
    assert epoch_permutation(5, 2, n).tolist() == sorted(range(n), key=lambda i: (raw[i] >> bits, i))


def block_permutation_step_by_step(seed, epoch, n, starts, streams, window):
    """What the docstring says, in plain Python."""
    ends = [*starts[1:], n]
    raw = np.random.Philox(key=np.array([seed, epoch << 8 | 2], np.uint64)).random_raw(len(starts)).tolist()
    bits = (len(starts) - 1).bit_length()
    permuted = sorted(range(len(starts)), key=lambda i: (raw[i] >> bits, i))
    laid = [sample for block in permuted for sample in range(starts[block], ends[block])]

    length = window * -(-n // len(starts))
    sizes = [len(range(stream, n, streams)) for stream in range(streams)]
    windows = -(-sizes[0] // length)
    spare = (streams * windows - 1).bit_length() + (length - 1).bit_length()
    raw = np.random.Philox(key=np.array([seed, epoch << 8 | 3], np.uint64)).random_raw(n).tolist()
    order = [None] * n
    for stream, size in enumerate(sizes):
        begin = sum(sizes[:stream])
        shuffled = []
        for first in range(begin, begin + size, length):
            shuffled += sorted(range(first, min(first + length, begin + size)), key=lambda i: (raw[i] >> spare, i))
        order[stream::streams] = [laid[i] for i in shuffled]
    return order


@pytest.mark.parametrize(("streams", "window"), [(1, 1), (2, 3), (7, 1), (7, 2), (16, 100)])
def test_block_order_is_what_it_says(streams, window):
    starts = np.array([0, 64, 128, 150, 214, 278, 300])  # short blocks at the ends of shards
    expected = block_permutation_step_by_step(3, 5, 333, starts.tolist(), streams, window)
    assert block_permutation(3, 5, 333, starts, streams=streams, window=window).tolist() == expected


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("streams", [1, 2, 3, 8])
@pytest.mark.parametrize("window", [1, 8])
def test_block_orders_are_permutations(n, streams, window):
    if streams <= n:
        order = block_permutation(1, 2, n, blocks_of(n, 10), streams=streams, window=window)
        np.testing.assert_array_equal(np.sort(order), np.arange(n))


@pytest.mark.parametrize("length", [64, 384])
def test_ranks_touch_little_more_than_their_share_of_blocks(length):
    n = 50_037
    every = EpochOrder("block", 1, n, block_starts=blocks_of(n, length))
    order = every(0)
    for num_workers in [k for k in (1, 2, 4, 8, 16, 32, 64) if every.streams % k == 0]:
        ideal = n / num_workers / length
        touched = [len(np.unique(order[rank::num_workers] // length)) for rank in range(num_workers)]
        assert max(touched) <= 1.2 * ideal


def test_samples_of_a_block_come_within_its_window():
    n, streams, window = 50_037, 64, 2
    order = block_permutation(0, 0, n, blocks_of(n), streams=streams, window=window)
    position = np.empty(n, np.int64)
    position[order] = np.arange(n)
    spread = [np.ptp(position[start : start + 64] // streams) for start in blocks_of(n)]
    # A block lies in at most two windows of one stream, or at the end of one stream and the beginning of the next.
    within_two_windows = np.array(spread) < 2 * window * 64
    assert within_two_windows.sum() >= len(spread) - (streams - 1)


def test_number_of_streams_depends_on_the_number_of_blocks_alone():
    assert [default_streams(blocks) for blocks in (1, 19, 20, 782, 2559, 2560, 10**6)] == [1, 1, 2, 64, 128, 256, 256]


@pytest.mark.parametrize("length", [16, 64, 384])
def test_batches_in_block_order_are_as_mixed_as_random_ones(length):
    # Chi-square of the class counts of a batch has mean (classes - 1) when samples are drawn at random. The mean of
    # 10 epochs of 195 batches has a standard deviation of sqrt(2 * 9 / 1950) = 0.1.
    n, classes, batch = 50_000, 10, 256
    labels = (np.arange(n) * classes // n)[pre_shuffle(0, n)]  # sorted by class before
    order = EpochOrder("block", 0, n, block_starts=blocks_of(n, length))
    chi_square = []
    for epoch in range(10):
        of_batches = labels[order(epoch)[: n - n % batch]].reshape(-1, batch)
        counts = np.stack([(of_batches == label).sum(1) for label in range(classes)], axis=1)
        chi_square.append(((counts - batch / classes) ** 2 / (batch / classes)).sum(1).mean())
    assert abs(np.mean(chi_square) - (classes - 1)) < 0.4


def test_block_order_separates_block_mates_of_the_epoch_before():
    n = 50_037
    order = EpochOrder("block", 0, n, block_starts=blocks_of(n))
    neighbours = [set(zip(o[:-1] // 64, o[1:] // 64, strict=True)) for o in (order(0), order(1))]
    assert len(neighbours[0] & neighbours[1]) < 0.2 * len(neighbours[0])


def test_replacement_draws_are_uniform_and_independent():
    n = 100_000
    draws = replacement_draws(0, 0, n)
    assert draws.min() >= 0
    assert draws.max() < n
    never = (np.bincount(draws, minlength=n) == 0).mean()
    assert abs(never - np.exp(-1)) < 0.005  # standard deviation 0.001
    histogram = np.bincount(draws * 10 // n, minlength=10)
    assert ((histogram - n / 10) ** 2 / (n / 10)).sum() < 30  # 9 degrees of freedom
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.015
    assert not np.array_equal(draws, replacement_draws(0, 1, n))
    assert replacement_draws(3, 0, 1).tolist() == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "sorted"}, "order is 'sorted'"),
        ({"mode": "block", "block_starts": None}, "needs the starts of its blocks"),
        ({"mode": "block", "block_starts": np.array([1, 5])}, "needs the starts of its blocks"),
        ({"mode": "block", "block_starts": np.array([0, 5, 5])}, "needs the starts of its blocks"),
        ({"mode": "block", "block_starts": np.array([0, 12])}, "needs the starts of its blocks"),
        ({"mode": "block", "streams": 11}, "11 streams"),
        ({"mode": "block", "window": 0}, "window of 0 blocks"),
    ],
)
def test_unfit_orders_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EpochOrder(**({"seed": 0, "num_samples": 10, "block_starts": np.array([0, 5])} | options))


@pytest.mark.parametrize("n", [1, 2, 3, 64, 1000])
def test_every_order_is_a_permutation(n):
    for order in (epoch_permutation(0, 0, n), epoch_permutation(2**64 - 1, 99, n), pre_shuffle(3, n)):
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_seeds_epochs_and_the_pre_shuffle_differ():
    orders = [
        epoch_permutation(0, 0, 100),
        epoch_permutation(0, 1, 100),
        epoch_permutation(1, 0, 100),
        pre_shuffle(0, 100),
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_bad_seed_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed {seed} is out of range"):
        epoch_permutation(seed, 0, 10)


def test_sequence_concatenates_the_epochs():
    sequence = SampleSequence(EpochOrder("global", 4, 7))
    samples, epochs = sequence.at(np.arange(5, 30))
    expected = np.concatenate([epoch_permutation(4, epoch, 7) for epoch in range(5)])
    np.testing.assert_array_equal(samples, expected[5:30])
    np.testing.assert_array_equal(epochs, np.arange(5, 30) // 7)
    np.testing.assert_array_equal(sequence.at(np.arange(2))[0], expected[:2])  # walking back is possible


def test_sequence_with_shorter_epochs():
    samples, epochs = SampleSequence(EpochOrder("global", 4, 7), samples_per_epoch=5).at(np.arange(10))
    np.testing.assert_array_equal(samples, [*epoch_permutation(4, 0, 7)[:5], *epoch_permutation(4, 1, 7)[:5]])
    np.testing.assert_array_equal(epochs, [0] * 5 + [1] * 5)


def test_splitmix64_reference_values():
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * golden) % 2**64 for i in range(3)], np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_keys_depend_on_seed_epoch_and_sample_only():
    epochs, samples = np.divmod(np.arange(10_000), 100)
    keys = sample_keys(0, epochs, samples)
    assert len(np.unique(keys)) == 10_000
    np.testing.assert_array_equal(sample_keys(0, epochs[::-3], samples[::-3]), keys[::-3])
    assert not np.isin(sample_keys(1, epochs, samples), keys).any()
