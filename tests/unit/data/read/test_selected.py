"""Some samples of a data set as a data set: which they are, and that they are the same bytes."""

import pickle

import h5py
import numpy as np
import pytest

from hvdlocal.data import Loader, evaluation_batches, open_hdf5
from hvdlocal.data.read.selected import Selected, hold_out

N = 500
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 1), dtype=np.uint8)
LABELS = np.repeat(np.arange(5), [300, 150, 40, 9, 1])


@pytest.fixture
def path(tmp_path):
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        file["images"], file["labels"] = IMAGES, LABELS
    return tmp_path / "mine.h5"


def test_two_parts_of_each_class(path):
    whole = open_hdf5(path)
    train, test = hold_out(whole, 0.1)
    assert np.bincount(test.labels, minlength=5).tolist() == [30, 15, 4, 1, 0]
    assert (len(train), len(test)) == (450, 50)
    found = [image.tobytes() for part in (train, test) for image in part.take(np.arange(len(part)))]
    assert sorted(found) == sorted(image.tobytes() for image in IMAGES)
    for part in (train, test):
        for number in (0, 7, len(part) - 1):
            np.testing.assert_array_equal(part.take([number])[0], IMAGES[part.index[number]])
            assert bytes(part.bytes_of(number)) == IMAGES[part.index[number]].tobytes()
            assert part.name_of(number) == whole.name_of(part.index[number])
        assert part.classes == whole.classes
        assert (np.diff(part.index) > 0).all()
    again = hold_out(open_hdf5(path), 0.1)
    np.testing.assert_array_equal(again[1].index, test.index)
    assert [part.fingerprint for part in again] == [train.fingerprint, test.fingerprint]
    others = [part.fingerprint for other in ((0.1, 1), (0.2, 0)) for part in hold_out(whole, *other)]
    assert len({whole.fingerprint, train.fingerprint, test.fingerprint, *others}) == 7


@pytest.mark.parametrize("storage", ["ram", "mmap", "stream"])
@pytest.mark.parametrize("order", ["global", "block"])
def test_an_epoch_has_every_selected_sample_once(path, storage, order, monkeypatch):
    monkeypatch.setattr("hvdlocal.data.read.storage.base.BLOCK_BYTES", 1000)
    monkeypatch.setattr("hvdlocal.data.read.hdf5_inspection.BLOCK_BYTES", 1000)
    train, test = hold_out(open_hdf5(path, storage=storage), 0.2)
    assert train.storage == storage
    assert (train.block_starts[0], train.block_starts[-1]) == (0, len(train))
    assert len(train.block_starts) > 10
    seen = [
        image.numpy().tobytes()
        for rank in range(2)
        for batch, _ in Loader(train, 20, rank=rank, num_workers=2, order=order, tail="partial")
        for image in batch
    ]
    assert sorted(seen) == sorted(image.tobytes() for image in IMAGES[train.index])
    tested = [image.numpy().tobytes() for batch, _ in evaluation_batches(test, 7) for image in batch]
    assert tested == [image.tobytes() for image in IMAGES[test.index]]


def test_blocks_without_a_selected_sample_are_left_out(path):
    whole = open_hdf5(path)
    chosen = Selected(whole, np.array([0, 1, 499]), {})
    chosen._whole = Blocks(whole)
    assert chosen.block_starts.tolist() == [0, 2, 3]


class Blocks:
    """A data set in blocks of 100 samples."""

    def __init__(self, whole):
        self.block_starts = np.arange(0, N + 1, 100)


def test_a_pickle_and_the_end(path):
    train, test = hold_out(open_hdf5(path), 0.1)
    again = pickle.loads(pickle.dumps(test))
    np.testing.assert_array_equal(again.take(np.arange(50)), test.take(np.arange(50)))
    assert again.fingerprint == test.fingerprint
    with pytest.raises(ValueError, match="leave the data set of 50 samples"):
        test.take([50])
    train.close()
    with pytest.raises(ValueError, match="was closed"):
        test.take([0])
    test.close()


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_a_share_out_of_range(path, share):
    with pytest.raises(ValueError, match=r"cannot be held out; choose one between 0 and 1"):
        hold_out(open_hdf5(path), share)
