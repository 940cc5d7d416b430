"""Random permutations as pure functions of a seed, the same on every machine and for every NumPy version.

NumPy promises that a bit generator's raw stream never changes, which it does not for `Generator.permutation`; so all orders are
made of Philox's raw numbers, sorted with an index in their low bits. That makes every key unique, and the result does not
depend on the sorting algorithm either.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PRE_SHUFFLE, EPOCH_ORDER, BLOCKS, INSIDE_WINDOWS, REPLACEMENT, HOLDOUT = range(6)
"""Numbers of independent streams of one seed. Those of an epoch are `epoch << 8 | number`."""


def pre_shuffle(seed: int, n: int) -> NDArray[np.int64]:
    """The order in which the writer lays n source samples on disk: int64 (n,), position -> source index.

    Independent of every `epoch_permutation` of the same seed.
    """
    return permutation(seed, PRE_SHUFFLE, n)


def held_out(seed: int, labels: NDArray[np.integer], share: float) -> NDArray[np.bool_]:
    """Which samples are kept from training and tested on: a share of each class, chosen at random.

    Args:
        seed: 0..2**64-1.
        labels: integers from 0 (n,), the class of each sample; all 0 where there are no classes.
        share: of each class, between 0 and 1. A class of c samples gives ⌊share · c + 1/2⌋ of them, but at least one and
            at most c - 1; a class of one sample gives none.

    Returns:
        bool (n,), True for samples that are held out.

    Raises:
        ValueError: the share or the seed is out of range, or no class has two samples.
    """
    if not 0 < share < 1:
        raise ValueError(f"a share of {share:g} cannot be held out; choose one between 0 and 1, for instance 0.1")
    order = permutation(seed, HOLDOUT, len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels)
    if sizes.max() < 2:
        raise ValueError(f"of {len(labels)} samples none can be held out: no class has two")
    taken = np.array([held_out_count(size, share) for size in sizes.tolist()])
    place = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within the class
    mask = np.zeros(len(labels), bool)
    mask[by_class[place < np.repeat(taken, sizes)]] = True
    return mask


def held_out_count(size: int, share: float) -> int:
    """How many samples a class of a size gives, see `held_out`."""
    return min(max(int(share * size + 0.5), 1), max(size - 1, 0))


def check_seed(seed: int, n: int) -> None:
    """Raises ValueError for a seed outside 0..2**64-1 or n < 1."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} is out of range; choose an integer from 0 to 2**64 - 1")
    if n < 1:
        raise ValueError(f"an order of {n} samples was asked for; there must be at least one")


def raw_bits(seed: int, stream: int, n: int) -> NDArray[np.uint64]:
    """The first n numbers of a stream, uint64 (n,)."""
    check_seed(seed, n)
    return np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(n)


def permutation(seed: int, stream: int, n: int) -> NDArray[np.int64]:
    """A permutation of 0..n-1 that the seed and the number of a stream determine, int64 (n,)."""
    raw = raw_bits(seed, stream, n)
    index_mask = np.uint64((1 << (n - 1).bit_length()) - 1)
    keys = (raw & ~index_mask) | np.arange(n, dtype=np.uint64)
    keys.sort()
    return (keys & index_mask).astype(np.int64)
