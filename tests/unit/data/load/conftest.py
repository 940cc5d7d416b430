"""Blocks as small as the data sets of these tests."""

import numpy as np
import pytest

from hvdlocal.data.read.dataset import ShardedDataset


@pytest.fixture
def small_blocks(monkeypatch):
    """Data sets of four samples per block, so that small ones have several streams and windows."""
    blocks = property(lambda dataset: np.append(np.arange(0, len(dataset), 4), len(dataset)))
    monkeypatch.setattr(ShardedDataset, "block_starts", blocks)
