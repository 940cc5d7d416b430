"""Arguments that a loader refuses."""

import pytest

from hvdlocal.data import Loader
from hvdlocal.data.augment import RandomResizedCrop
from hvdlocal.data.read.dataset import ShardedDataset


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 2, "num_workers": 2}, r"rank is 2.*0\.\.1"),
        ({"rank": -1}, "rank is -1"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"tail": "pad"}, "tail is 'pad'"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"order": "sorted"}, "order is 'sorted'"),
        ({"crop": RandomResizedCrop(8)}, "crop is for JPEGs"),
        ({"seed": -1}, "seed -1"),
        ({"batch_size": 51, "tail": "drop"}, "50 samples do not fill a global batch of 51"),
    ],
)
def test_unfit_arguments_are_refused(make_dataset, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(make_dataset(50), **({"batch_size": 4} | options))


@pytest.mark.parametrize("name", ["batch_size", "rank", "num_workers"])
def test_counts_must_be_integers(make_dataset, name):
    with pytest.raises(ValueError, match=rf"{name} is 1\.5; it must be an integer"):
        Loader(make_dataset(20), **({"batch_size": 4, "num_workers": 3} | {name: 1.5}))


def test_order_of_streamed_data_that_are_not_shuffled_must_be_chosen(make_dataset, tmp_path):
    make_dataset(20)
    dataset = ShardedDataset(tmp_path, storage="stream")
    dataset.shuffled = False
    with pytest.raises(ValueError, match="do not lie in random order"):
        Loader(dataset, 4)
    Loader(dataset, 4, order="block")
    dataset.close()
