"""Per-sample random keys: counter-based, so that augmentation depends on nothing but (seed, epoch, sample)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output of the SplitMix64 generator (Steele et al., OOPSLA 2014) for each state, uint64 (n,)."""
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample_keys(seed: int, epochs: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits per sample, a pure function of (seed, epoch, sample index).

    Args:
        seed: 0..2**64-1.
        epochs: int64 (n,), the epoch each sample is drawn in.
        samples: int64 (n,), the sample indices.
    """
    key = splitmix64(np.array([seed], np.uint64))
    key = splitmix64(key + epochs.astype(np.uint64))
    return splitmix64(key + samples.astype(np.uint64))
