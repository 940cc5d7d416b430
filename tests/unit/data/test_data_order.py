import hashlib

import numpy as np
import pytest

from hvdlocal.data.keys import sample_keys, splitmix64
from hvdlocal.data.order import SampleSequence, epoch_permutation, pre_shuffle


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.astype("<i8").tobytes()).hexdigest()


def test_golden_orders():
    # A checkpoint means nothing without these: they must never change within format version 1.
    assert epoch_permutation(0, 0, 10).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert sha256(epoch_permutation(7, 3, 50_037)) == "0747e8666d3638fff44524eaa3c98148cb26c8414cfb6734b07f9ab9e49bc838"
    assert sha256(pre_shuffle(7, 50_037)) == "05eec2254a51264d1264b3d2df511608d60a578280addb6ed9ff52d7db7c6343"


def test_order_is_a_sort_by_philox_keys():
    n, bits = 1000, 10
    raw = np.random.Philox(key=np.array([5, 2 << 8 | 1], np.uint64)).random_raw(n).tolist()
    assert epoch_permutation(5, 2, n).tolist() == sorted(range(n), key=lambda i: (raw[i] >> bits, i))


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
    sequence = SampleSequence(7, seed=4)
    samples, epochs = sequence.at(np.arange(5, 30))
    expected = np.concatenate([epoch_permutation(4, epoch, 7) for epoch in range(5)])
    np.testing.assert_array_equal(samples, expected[5:30])
    np.testing.assert_array_equal(epochs, np.arange(5, 30) // 7)
    np.testing.assert_array_equal(sequence.at(np.arange(2))[0], expected[:2])  # walking back is possible


def test_sequence_with_shorter_epochs():
    samples, epochs = SampleSequence(7, seed=4, samples_per_epoch=5).at(np.arange(10))
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
