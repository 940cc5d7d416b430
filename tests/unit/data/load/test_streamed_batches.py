"""Loaders of streamed data: block order, read ahead, and too little memory."""

import warnings
from itertools import islice

import numpy as np
import pytest
from loaders import source_index

from hvdlocal.data import Loader, evaluation_batches
from hvdlocal.data.load.order import EpochOrder
from hvdlocal.data.read.dataset import ShardedDataset


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_streamed_data_come_in_block_order_and_are_announced(make_dataset, tmp_path, monkeypatch, num_workers):
    make_dataset(300, num_shards=2)
    dataset = ShardedDataset(tmp_path, storage="stream")
    announced, taken = [], []
    gather, read_ahead = dataset.gather, dataset.read_ahead
    monkeypatch.setattr(dataset, "gather", lambda rows, out: (taken.append(rows), gather(rows, out))[1])
    monkeypatch.setattr(dataset, "read_ahead", lambda rows: (announced.append(rows), read_ahead(rows))[1])
    loader = Loader(dataset, 5, num_workers=num_workers, threads=1)
    order = EpochOrder("block", 0, 300, block_starts=dataset.block_starts)
    assert order.window_samples == 4 * 8 * 4
    assert loader.state_dict()["order"] == "block"
    seen = np.concatenate([source_index(images) for images, _ in islice(loader.endless(), 10)])
    np.testing.assert_array_equal(seen, dataset.index[order(0)[: 10 * 5 * num_workers : num_workers]])
    ahead = sum(map(len, announced)) - sum(map(len, taken))
    assert ahead >= 128 / num_workers - 5
    np.testing.assert_array_equal(np.concatenate(announced)[: 10 * 5], np.concatenate(taken)[: 10 * 5])
    dataset.close()


def test_streamed_data_are_evaluated_in_order(make_dataset, tmp_path):
    make_dataset(300, num_shards=2)
    dataset = ShardedDataset(tmp_path, storage="stream")
    seen = [source_index(images) for images, _ in evaluation_batches(dataset, 7, rank=1, num_workers=3)]
    np.testing.assert_array_equal(np.concatenate(seen), dataset.index[100:200])
    dataset.close()


def test_a_stream_with_too_little_room_is_said(make_dataset, monkeypatch):
    dataset = make_dataset(101, storage="stream")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loader(dataset, 8)
    monkeypatch.setattr(ShardedDataset, "stream_bytes", property(lambda _: 2 * 101 * 24 // 2 - 1))
    with pytest.warns(UserWarning, match="two windows of the streamed data set"):
        Loader(dataset, 8, num_workers=2)


@pytest.mark.parametrize("order", ["global", "replacement"])
def test_a_slow_order_of_streamed_data_is_said(make_dataset, monkeypatch, order):
    dataset = make_dataset(101, storage="stream")
    monkeypatch.setattr(ShardedDataset, "stream_bytes", property(lambda _: 101 * 24))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loader(dataset, 8, order=order)
    monkeypatch.setattr(ShardedDataset, "stream_bytes", property(lambda _: 101 * 24 - 1))
    with pytest.warns(
        UserWarning, match=rf"order='{order}' reads a block for almost every sample.*choose order='block'"
    ):
        Loader(dataset, 8, order=order)
