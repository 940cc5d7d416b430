"""Which sample when: the order of a run as a pure function of (seed, epoch, number of samples)."""

import numpy as np
from numpy.typing import NDArray

_PRE_SHUFFLE, _EPOCH_ORDER = 0, 1


def _permutation(seed: int, stream: int, n: int) -> NDArray[np.int64]:
    # NumPy promises that a bit generator's raw stream never changes, which it does not for Generator.permutation.
    # With the index in its low bits every key is unique, so the result does not depend on the sorting algorithm
    # either.
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} is out of range; choose an integer from 0 to 2**64 - 1")
    if n < 1:
        raise ValueError(f"an order of {n} samples was asked for; there must be at least one")
    raw = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(n)
    index_mask = np.uint64((1 << (n - 1).bit_length()) - 1)
    keys = (raw & ~index_mask) | np.arange(n, dtype=np.uint64)
    keys.sort()
    return (keys & index_mask).astype(np.int64)


def epoch_permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order in which epoch ``epoch`` (from 0) visits samples 0..n-1: an int64 permutation of shape (n,).

    It is the same on every machine and for every NumPy version. Raises ValueError for a seed outside 0..2**64-1 or n
    < 1.
    """
    return _permutation(seed, epoch << 8 | _EPOCH_ORDER, n)


def pre_shuffle(seed: int, n: int) -> NDArray[np.int64]:
    """The order in which the writer lays n source samples on disk: int64 (n,), position -> source index.

    Independent of every ``epoch_permutation`` of the same seed.
    """
    return _permutation(seed, _PRE_SHUFFLE, n)


class SampleSequence:
    """The endless sequence perm_0 ++ perm_1 ++ … that a run walks along.

    Position p lies in epoch ``p // samples_per_epoch``. No number of workers enters: global batch t takes the positions
    [tG, (t+1)G), and how ranks divide these among themselves is their affair.

    Args:
        num_samples: number of samples in the data set.
        seed: seed of the order.
        samples_per_epoch: how much of each permutation is used (1..num_samples); all of it unless told otherwise.
    """

    def __init__(self, num_samples: int, *, seed: int = 0, samples_per_epoch: int | None = None) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.samples_per_epoch = num_samples if samples_per_epoch is None else samples_per_epoch
        if not 1 <= self.samples_per_epoch <= num_samples:
            raise ValueError(f"samples_per_epoch {self.samples_per_epoch} must lie in 1..{num_samples} (num_samples)")
        self._cached: tuple[int, NDArray[np.int64]] = (0, epoch_permutation(seed, 0, num_samples))

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The sample index and the epoch at each of the given positions (int64 (n,), ascending): int64 (n,) each."""
        epochs, offsets = np.divmod(positions, self.samples_per_epoch)
        samples = np.empty_like(offsets)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            inside = epochs == epoch
            samples[inside] = self._permutation(epoch)[offsets[inside]]
        return samples, epochs

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        cached = self._cached  # read once: another thread may be at another epoch
        if cached[0] != epoch:
            self._cached = cached = (epoch, epoch_permutation(self.seed, epoch, self.num_samples))
        return cached[1]
