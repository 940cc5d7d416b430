"""The kind "tokens": a stream of token ids, read in windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.kinds.base import (
    Assembly,
    Batch,
    Column,
    Empty,
    Facts,
    Kind,
    Samples,
    Selection,
    is_whole,
    timed,
    units_of,
)
from hvdlocal.data.random_keys import sample_keys

if TYPE_CHECKING:
    from hvdlocal.data.augment import Crop

ROW = 256
"""Tokens that are stored as one sample: few enough that little more is read than a window needs."""

CRC_ROWS = 64
"""Rows per checksum."""

DTYPES = ("uint8", "uint16", "uint32")

IGNORED = -100
"""Target where a window of an evaluation goes beyond the end of the stream; `torch.nn.functional.cross_entropy` ignores it."""


class Tokens(Kind):
    """A stream of N token ids, stored in rows of 256 and read in windows of T + 1 neighbours, for a block of T.

    A batch is int64 (n, T) inputs, and as targets the same shifted by one: int64 (n, T).

    * In training, an epoch has n = max(⌊N / T⌋ − 1, 1) windows, which follow each other without overlap from an offset on that
      is a pure function of seed and epoch, uniform over 0..T − 1 (or over what room there is, in a stream shorter than 2 T).
      So every token is predicted at most once per epoch, with another context in each; fewer than 2 T at the two ends
      are left out.
    * An evaluation begins at 0 and predicts every token but the first exactly once. Its last window may be shorter: there
      inputs are 0 and targets `IGNORED`.

    The facts are `dtype`, `vocabulary` (V, token ids are below it), `num_tokens` (N) and `block` (T, unless the reader chooses
    another). The statistic is `text_bytes`, the bytes of text that all tokens stand for. The table `token_bytes`, uint16
    (V,), says it of each token id.
    """

    name = "tokens"
    facts = ("dtype", "vocabulary", "num_tokens", "block")
    statistics = ("text_bytes",)
    per_sample = ()
    shared = ("token_bytes",)
    shuffled = False
    cut_when_read = True
    chosen = ("block",)

    def sound(self, facts: Facts) -> dict[str, bool]:
        """See `Kind`."""
        return {
            "dtype": facts["dtype"] in DTYPES,
            "vocabulary": is_whole(facts["vocabulary"], 1),
            "num_tokens": is_whole(facts["num_tokens"], 2),
            "block": is_whole(facts["block"], 1) and facts["block"] < facts["num_tokens"],
            "text_bytes": is_whole(facts["text_bytes"], 0),
        }

    def least_bytes(self, facts: Facts) -> int:
        """See `Kind`."""
        return ROW * np.dtype(facts["dtype"]).itemsize

    def combine(self, parts: Sequence[Any]) -> dict[str, Any]:
        """See `Kind`; a part is a number of bytes."""
        return {"text_bytes": sum(parts)}

    def tables(self, facts: Facts, samples: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See `Kind`."""
        return {"token_bytes": ("<u2", (facts["vocabulary"],)), "crc32": ("<u4", (-(-samples // CRC_ROWS),))}

    def columns(self, facts: Facts, samples: int, tables: Mapping[str, NDArray[Any]]) -> list[Column]:
        """See `Kind`."""
        dtype = np.dtype(facts["dtype"]).newbyteorder("<")
        return [Column("tokens", dtype, (samples, ROW), units_of(samples, CRC_ROWS))]

    def contents(self, facts: Facts, stored: int) -> str:
        """See `Kind`."""
        return f"{facts['num_tokens']} tokens"

    def num_samples(self, facts: Facts, stored: int) -> int:
        """See `Kind`: the windows of a training epoch."""
        num_tokens, block = facts["num_tokens"], facts["block"]
        if stored != rows_of(num_tokens):
            raise ValueError(
                f"{num_tokens} tokens do not fill {stored} rows of {ROW}: the manifest is not one that a writer wrote"
            )
        if block >= num_tokens:
            raise ValueError(
                f"block={block}: the text has {num_tokens} tokens, and a block must be shorter; choose at most {num_tokens - 1}"
            )
        return max(num_tokens // block - 1, 1)

    def num_evaluated(self, facts: Facts, stored: int) -> int:
        """See `Kind`."""
        return -(-(facts["num_tokens"] - 1) // facts["block"])

    def block_starts(self, facts: Facts, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Kind`; a window belongs to the block where it begins at offset 0."""
        windows = -(-starts[:-1] * ROW // facts["block"])
        count = self.num_samples(facts, int(starts[-1]))
        return np.append(np.unique(windows[windows < count]), count)

    def stored(self, facts: Facts, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Kind`; the rows where windows may lie, whatever their offset."""
        block, last = facts["block"], rows_of(facts["num_tokens"]) - 1
        first = samples * block // ROW
        return np.unique(np.minimum(first[:, None] + np.arange((2 * block + ROW) // ROW + 1), last))

    def take(self, samples: Samples, rows: NDArray[np.int64], out: Any = None) -> Any:
        """See `Kind`: the windows (n, T + 1) at offset 0, in the dtype of the stream."""
        block = samples.facts["block"]
        windows = _windows(samples, rows * block)
        if out is None:
            return windows
        if out.shape != windows.shape or out.dtype != windows.dtype:
            raise ValueError(f"out is {out.dtype} {out.shape}; {windows.dtype} {windows.shape} is needed")
        out[...] = windows
        return out

    def batch(
        self,
        samples: Samples,
        selection: Selection,
        crop: Crop | None,
        empty: Empty,
    ) -> Assembly:
        """See `Kind`."""
        block, num_tokens = samples.facts["block"], samples.facts["num_tokens"]
        shape = (len(selection.samples), block)
        inputs, targets = empty(shape, np.int64), empty(shape, np.int64)

        def read() -> int:
            starts = selection.samples * block
            if not selection.evaluation:
                starts = starts + offsets(selection.seed, selection.epochs, num_tokens, block)
            windows = _windows(samples, starts)
            x, y = inputs.numpy(), targets.numpy()
            x[...], y[...] = windows[:, :-1], windows[:, 1:]
            if selection.evaluation:
                beyond = starts[:, None] + np.arange(1, block + 1) >= num_tokens
                x[beyond], y[beyond] = 0, IGNORED
            return windows.nbytes

        def finish() -> Batch:
            return inputs, targets

        return Assembly([timed(read)], finish)


def with_block(kind: str, facts: Facts, block: int) -> Facts:
    """The facts of a data set for a reader who chooses the length of the sequences. Raises ValueError if it holds no tokens."""
    if kind != Tokens.name:
        raise ValueError(f"block={block} is for tokens, but these samples are {kind}; leave it out")
    return {**facts, "block": checked_block(block)}


def checked_block(block: Any) -> int:
    """Returns the length of the sequences as an int. Raises ValueError if it is none."""
    if not isinstance(block, Integral) or isinstance(block, bool) or block < 1:
        raise ValueError(f"block={block!r}: a block is a whole number of tokens, at least 1")
    return int(block)


def rows_of(num_tokens: int) -> int:
    """The number of rows that so many tokens take; the last is filled up with 0."""
    return -(-num_tokens // ROW)


def offsets(seed: int, epochs: NDArray[np.int64], num_tokens: int, block: int) -> NDArray[np.int64]:
    """Where the first window of each of the given epochs (int64 (n,)) begins, int64 (n,)."""
    room = min(block, num_tokens - max(num_tokens // block - 1, 1) * block)
    return np.array([_offset(seed, epoch, room) for epoch in epochs.tolist()], np.int64)


@lru_cache(maxsize=4)  # a batch touches one epoch or two
def _offset(seed: int, epoch: int, room: int) -> int:
    keys = sample_keys(seed, np.array([epoch]), np.array([-1]))  # of a sample that there is not
    return int(keys[0] % np.uint64(room))


def _windows(samples: Samples, starts: NDArray[np.int64]) -> NDArray[Any]:
    """The block + 1 tokens from each start on (int64 (n,)), (n, block + 1); beyond the end of the stream they mean nothing."""
    facts = samples.facts
    length, dtype = facts["block"] + 1, np.dtype(facts["dtype"])
    if not len(starts):
        return np.empty((0, length), dtype)
    span = (length + ROW - 2) // ROW + 1  # rows that a window may touch
    first, within = np.divmod(starts, ROW)
    rows = np.minimum(first[:, None] + np.arange(span), rows_of(facts["num_tokens"]) - 1)
    read = np.empty((rows.size, ROW), dtype)
    samples.gather(rows.ravel(), read)
    # Every window of what was read, without copying it; those that are wanted are then copied.
    every = np.ndarray((read.size - length + 1, length), dtype, read, strides=(dtype.itemsize, dtype.itemsize))
    return every[np.arange(len(starts)) * (span * ROW) + within]
