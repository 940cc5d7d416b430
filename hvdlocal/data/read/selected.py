"""Some samples of a data set, as a data set: a split of a file that has none."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvdlocal.data.format.manifest import sha256_of_json
from hvdlocal.data.permutations import held_out
from hvdlocal.data.read.dataset import StoredSamples


def hold_out(samples: StoredSamples, share: float, seed: int = 0) -> tuple[Selected, Selected]:
    """Splits a data set in two at random: to train on, and to test on.

    Args:
        samples: the data set, which both keep using.
        share: that is held out for testing, see `held_out`; of each class where samples have labels.
        seed: of the choice.

    Raises:
        ValueError: see `held_out`.
    """
    labels = np.zeros(len(samples), np.int32) if samples.labels is None else samples.labels
    mask = held_out(seed, labels, share)
    chosen = {"share": share, "seed": seed}
    return (
        Selected(samples, np.flatnonzero(~mask), {**chosen, "part": "train"}),
        Selected(samples, np.flatnonzero(mask), {**chosen, "part": "test"}),
    )


class Selected(StoredSamples):
    """Samples of another data set, in its storage.

    Args:
        whole: the data set; closing a selection closes it.
        rows: int64 (n,), ascending, its samples that are selected.
        choice: identifies the selection, for the fingerprint.
    """

    def __init__(self, whole: StoredSamples, rows: NDArray[np.int64], choice: dict[str, Any]) -> None:
        self._whole = whole
        self._rows = rows
        self._length = self._stored = len(rows)
        self._choice = choice
        self.kind = whole.kind
        self.shuffled = whole.shuffled
        self.facts = whole.facts
        self.tables = {name: table[rows] for name, table in whole.tables.items()}

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the data set's fingerprint and the choice."""
        return sha256_of_json({"whole": self._whole.fingerprint, **self._choice})

    @property
    def storage(self) -> str:
        """See `StoredSamples`."""
        return self._whole.storage

    @property
    def block_starts(self) -> NDArray[np.int64]:
        """See `StoredSamples`; of blocks without a selected sample nothing is left."""
        return np.unique(np.searchsorted(self._rows, self._whole.block_starts))

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole data set, which are held for every selection."""
        return self._whole.num_bytes

    @property
    def stream_bytes(self) -> int | None:
        """See `StoredSamples`."""
        return self._whole.stream_bytes

    def describe(self) -> str:
        """See `StoredSamples`."""
        return self._whole.describe()

    def gather(self, rows: NDArray[np.int64], out: NDArray[Any], column: int = 0) -> None:
        """See `StoredSamples`."""
        self._whole.gather(self._rows[rows], out, column)

    def bytes_of(self, sample: int, column: int = 0) -> memoryview:
        """See `StoredSamples`."""
        return self._whole.bytes_of(self._row(sample), column)

    def name_of(self, sample: int, column: int = 0) -> str:
        """See `StoredSamples`."""
        return self._whole.name_of(self._row(sample), column)

    def read_ahead(self, samples: ArrayLike) -> None:
        """See `StoredSamples`."""
        self._whole.read_ahead(self._rows[self._checked(samples)])

    def close(self) -> None:
        """Closes the whole data set."""
        self._whole.close()

    def _row(self, sample: int) -> int:
        return int(self._rows[int(self._checked([sample])[0])])
