import hashlib

import numpy as np
import pytest

from data_prep import synthetic
from data_prep.__main__ import main
from hvdlocal.data import ShardedDataset
from hvdlocal.data.format.manifest import Manifest


def test_the_same_numbers_everywhere():
    images = synthetic.load(20, 4, 8, seed=3).splits["train"].samples
    found = hashlib.sha256(images[np.arange(20)].tobytes()).hexdigest()
    assert found == "494d5cc60f662c1fdc6bd52510be14ac20f6ceff4bfc0da3d318c7c5e2ad7a20"
    np.testing.assert_array_equal(images[np.array([3, 7])], images[np.arange(20)][[3, 7]])


def test_splits(tmp_path):
    arguments = ["synthetic", "--output", str(tmp_path), "--samples", "60", "--classes", "12", "--size", "8"]
    assert main(arguments) == 0
    train, test = ShardedDataset(tmp_path), ShardedDataset(tmp_path, "test")
    assert (len(train), len(test), train.shape, train.num_classes) == (60, 12, (8, 8, 3), 12)
    assert train.classes[:2] == ("class00", "class01")
    np.testing.assert_array_equal(train.labels, train.index % 12)
    assert sorted(np.bincount(test.labels)) == [1] * 12
    assert not {x.tobytes() for x in train.take(range(60))} & {x.tobytes() for x in test.take(range(12))}


def test_it_can_be_learned(tmp_path):
    """The nearest mean of a class, known from the train split, names the class in the test split."""
    source = synthetic.load(500, 10, 16, seed=0)
    images, labels = (
        source.splits["train"].samples[np.arange(500)].astype(float),
        source.splits["train"].labels,
    )
    means = np.stack([images[labels == label].mean(axis=0) for label in range(10)])
    test = source.splits["test"].samples[np.arange(100)].astype(float)
    distances = ((test[:, None] - means) ** 2).sum(axis=(2, 3, 4))
    assert (distances.argmin(axis=1) == source.splits["test"].labels).mean() == 1


def test_jpeg(tmp_path):
    pytest.importorskip("simplejpeg")
    arguments = ["synthetic", "--output", str(tmp_path), "--samples", "50", "--size", "32", "--jpeg", "--shards", "3"]
    assert main(arguments) == 0
    manifest = Manifest.load(tmp_path / "train" / "manifest.json")
    assert (manifest.kind, manifest.num_samples, len(manifest.shards)) == ("jpeg", 50, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "5"], "--samples 5 --classes 10: there must be at least one sample of each class"),
        (["--classes", "0"], "--classes 0"),
        (["--size", "3"], "--size 3 is out of range"),
        (["--seed", "-1"], "seed -1"),
    ],
)
def test_mistakes(tmp_path, options, message, capsys):
    assert main(["synthetic", "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
