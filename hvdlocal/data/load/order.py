"""Which sample when: the order of a run as a pure function of (seed, epoch) and the data set."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.permutations import (
    BLOCKS,
    EPOCH_ORDER,
    INSIDE_WINDOWS,
    REPLACEMENT,
    check_seed,
    permutation,
    raw_bits,
)

OrderMode = Literal["global", "block", "replacement"]

MAX_STREAMS = 256  # whatever number of ranks divides it gets streams of its own
BLOCKS_PER_STREAM = (
    10  # at least; the blocks that a stream shares with its neighbours are then at most a fifth more to read
)
WINDOW = 8  # blocks of each stream that are shuffled together


def epoch_permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order in which epoch `epoch` (from 0) visits samples 0..n-1: an int64 permutation of shape (n,).

    It is the same on every machine and for every NumPy version. Raises ValueError for a seed outside 0..2**64-1 or n
    < 1.
    """
    return permutation(seed, epoch << 8 | EPOCH_ORDER, n)


def block_permutation(
    seed: int, epoch: int, n: int, block_starts: NDArray[np.int64], *, streams: int, window: int
) -> NDArray[np.int64]:
    """A permutation that visits the samples of a block of neighbours closely together, so that it can be read at once.

    All blocks are permuted and laid end to end. What results is cut into `streams` equal pieces (±1 sample), and each of
    these is shuffled inside windows of `window` mean block lengths. The i-th sample of stream c comes at position
    i * streams + c. So a reader of every K-th position touches only its own streams' blocks, if K divides `streams`.

    Args:
        seed, epoch, n: see `epoch_permutation`.
        block_starts: int64 (blocks,), the first sample of every block, ascending from 0.
        streams: C, 1..n.
        window: W, at least 1.

    Returns:
        int64 (n,).
    """
    lengths = np.diff(block_starts, append=n)
    permuted = permutation(seed, epoch << 8 | BLOCKS, len(block_starts))
    laid = _concatenated_ranges(block_starts[permuted], lengths[permuted])

    # The low bits of a key are a sample's place in its window, the high bits the window: sorting shuffles inside them.
    window_length = window * -(-n // len(block_starts))
    stream_lengths = (n - np.arange(streams) + streams - 1) // streams
    place_in_stream = _concatenated_ranges(np.zeros(streams, np.int64), stream_lengths)
    windows_per_stream = -(-int(stream_lengths[0]) // window_length)
    number, place = np.divmod(place_in_stream, window_length)
    number += np.repeat(np.arange(streams) * windows_per_stream, stream_lengths)
    place_bits = (window_length - 1).bit_length()
    number_bits = (streams * windows_per_stream - 1).bit_length()
    raw = raw_bits(seed, epoch << 8 | INSIDE_WINDOWS, n) >> np.uint64(number_bits + place_bits) << np.uint64(place_bits)
    keys = number.astype(np.uint64) << np.uint64(64 - number_bits) if number_bits else np.zeros(n, np.uint64)
    keys |= raw | place.astype(np.uint64)
    keys.sort()
    window_start = np.arange(n) - place
    shuffled = laid[window_start + (keys & np.uint64((1 << place_bits) - 1)).astype(np.int64)]

    order = np.empty(n, np.int64)
    ends = np.cumsum(stream_lengths)
    for stream, (end, length) in enumerate(zip(ends.tolist(), stream_lengths.tolist(), strict=True)):
        order[stream::streams] = shuffled[end - length : end]
    return order


def replacement_draws(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """Independent uniform draws from 0..n-1, int64 (n,): the setting of the theory, where an epoch is only a length."""
    raw = raw_bits(seed, epoch << 8 | REPLACEMENT, n)
    # floor(raw * n / 2**64) without a 128-bit product, for n < 2**32.
    high, low = raw >> np.uint64(32), raw & np.uint64(2**32 - 1)
    return ((high * np.uint64(n) + (low * np.uint64(n) >> np.uint64(32))) >> np.uint64(32)).astype(np.int64)


class EpochOrder:
    """The order of every epoch of a run: a pure function of its arguments and the epoch, whatever the number of ranks.

    Args:
        mode: "global": a permutation of all samples. "block": `block_permutation`, for storage that should be read in
            large pieces. "replacement": `replacement_draws`.
        seed: 0..2**64-1.
        num_samples: N.
        block_starts: int64 (blocks,), see `block_permutation`, with or without a last entry of N; for "block" alone.
        streams: C of "block"; by default 256, halved until a stream has ten blocks.
        window: W of "block".

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        mode: OrderMode,
        seed: int,
        num_samples: int,
        *,
        block_starts: NDArray[np.int64] | None = None,
        streams: int | None = None,
        window: int = WINDOW,
    ) -> None:
        if mode not in get_args(OrderMode):
            raise ValueError(f"order is {mode!r}; choose 'global', 'block' or 'replacement'")
        check_seed(seed, num_samples)
        self.mode = mode
        self.seed = seed
        self.num_samples = num_samples
        if mode != "block":
            return
        if block_starts is not None and block_starts[-1] == num_samples:
            block_starts = block_starts[:-1]
        if block_starts is None or block_starts[0] != 0 or (np.diff(block_starts, append=num_samples) < 1).any():
            raise ValueError(f"order='block' needs the starts of its blocks, ascending in 0..{num_samples - 1} from 0")
        self.block_starts = block_starts
        self.streams = default_streams(len(block_starts)) if streams is None else streams
        self.window = window
        if not 1 <= self.streams <= num_samples or window < 1:
            raise ValueError(f"{self.streams} streams and a window of {window} blocks do not fit {num_samples} samples")

    @property
    def state(self) -> dict[str, Any]:
        """The integers (and the mode) that, with the data set, say which order this is."""
        state: dict[str, Any] = {"seed": self.seed, "order": self.mode}
        if self.mode == "block":
            state |= {"blocks": len(self.block_starts), "streams": self.streams, "window": self.window}
        return state

    @property
    def window_samples(self) -> int:
        """How many positions of an epoch share their windows: what a reader should have in memory, over all ranks."""
        if self.mode != "block":
            return 0
        return min(self.num_samples, self.streams * self.window * -(-self.num_samples // len(self.block_starts)))

    def __call__(self, epoch: int) -> NDArray[np.int64]:
        """The samples of epoch `epoch` (from 0), int64 (N,)."""
        if self.mode == "block":
            return block_permutation(
                self.seed, epoch, self.num_samples, self.block_starts, streams=self.streams, window=self.window
            )
        return (epoch_permutation if self.mode == "global" else replacement_draws)(self.seed, epoch, self.num_samples)


def default_streams(num_blocks: int) -> int:
    """The number of streams C for `num_blocks` blocks: a power of two, so that most K divide it; it depends on the data alone."""
    streams = MAX_STREAMS
    while streams > 1 and streams * BLOCKS_PER_STREAM > num_blocks:
        streams //= 2
    return streams


class SampleSequence:
    """The endless sequence order_0 ++ order_1 ++ … that a run walks along.

    Position p lies in epoch `p // samples_per_epoch`. No number of workers enters: global batch t takes the positions
    [tG, (t+1)G), and how ranks divide these among themselves is their affair.

    Args:
        order: the order of every epoch.
        samples_per_epoch: how much of each order is used (1..num_samples); all of it unless told otherwise.
    """

    def __init__(self, order: EpochOrder, *, samples_per_epoch: int | None = None) -> None:
        self.order = order
        self.samples_per_epoch = order.num_samples if samples_per_epoch is None else samples_per_epoch
        if not 1 <= self.samples_per_epoch <= order.num_samples:
            raise ValueError(
                f"samples_per_epoch {self.samples_per_epoch} must lie in 1..{order.num_samples} (num_samples)"
            )
        self._cached: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The sample index and the epoch at each of the given positions (int64 (n,), ascending): int64 (n,) each."""
        epochs, offsets = np.divmod(positions, self.samples_per_epoch)
        samples = np.empty_like(offsets)
        if not len(positions):
            return samples, epochs
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            inside = epochs == epoch
            samples[inside] = self._epoch(epoch)[offsets[inside]]
        return samples, epochs

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        cached = self._cached  # read once: another thread may be at another epoch
        if cached[0] != epoch:
            self._cached = cached = (epoch, self.order(epoch))
        return cached[1]


def _concatenated_ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """starts[0], starts[0]+1, …, starts[0]+lengths[0]-1, starts[1], …"""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
