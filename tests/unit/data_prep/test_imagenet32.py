import pickle

import numpy as np
import pytest

from data_prep import imagenet32
from data_prep.__main__ import main
from hvdlocal.data import ShardedDataset


@pytest.fixture
def tree(tmp_path):
    """Writes pickles as the official ones: ten of three images, and one of four to validate on."""

    def write(side=16, **changes):
        directory = tmp_path / "source"
        directory.mkdir(exist_ok=True)
        rng = np.random.RandomState(side)
        batches = {}
        for name in [*(f"train_data_batch_{number}" for number in range(1, 11)), "val_data"]:
            count = 4 if name == "val_data" else 3
            batch = {
                "data": rng.randint(0, 256, (count, 3 * side * side)).astype(np.uint8),
                "labels": rng.randint(1, 1001, count).tolist(),
                "mean": rng.rand(3 * side * side),  # as in the official batches; not used
            }
            batches[name] = batch | changes.get(name, {})
            (directory / name).write_bytes(pickle.dumps(batches[name], 2))
        return directory, batches

    return write


@pytest.mark.parametrize("side", [8, 16, 32, 64])
def test_pixels_and_labels(tree, tmp_path, side):
    source, batches = tree(side)
    assert main(["imagenet32", "--source", str(source), "--output", str(tmp_path / "out"), "--shards", "2"]) == 0
    train, val = ShardedDataset(tmp_path / "out"), ShardedDataset(tmp_path / "out", "val")
    assert (len(train), len(val), train.shape) == (30, 4, (side, side, 3))
    position = int(np.flatnonzero(train.index == 16)[0])  # image 1 of batch 6
    batch = batches["train_data_batch_6"]
    np.testing.assert_array_equal(train.take([position])[0], batch["data"][1].reshape(3, side, side).transpose(1, 2, 0))
    assert train.labels[position] == batch["labels"][1] - 1
    assert train.classes == tuple(str(label) for label in range(1, 1001))


def test_class_names(tree, tmp_path):
    source, _ = tree()
    lines = [f"n{9_000_000 - number:08d} {number} some_thing" for number in range(1, 1001)]
    (source / "map_clsloc.txt").write_text("\n".join(lines) + "\n")
    classes = imagenet32.load(source).splits["train"].classes
    assert (classes[0], classes[999]) == ("n08999999", "n08999000")  # the order of the labels, not the sorted one
    (source / "map_clsloc.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"map_clsloc\.txt names 999 labels where 1\.\.1000 are due"):
        imagenet32.load(source)
    (source / "map_clsloc.txt").write_text("kit fox\n")
    with pytest.raises(ValueError, match=r"line 1 of .*map_clsloc\.txt is 'kit fox'"):
        imagenet32.load(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1, 2]}, r"train_data_batch_2 holds labels 0\.\.2 where 1\.\.1000 are due"),
        ({"labels": [1, 2, 1001]}, r"labels 1\.\.1001"),
        ({"labels": [1, 2]}, "does not hold uint8"),
        ({"data": np.zeros((3, 48), np.uint8)}, "does not hold uint8"),
        ({"data": np.zeros((3, 768))}, "does not hold uint8"),
        ({"data": np.zeros((3, 768), complex)}, r"train_data_batch_2 is not a batch of downsampled ImageNet \(.*'c16'"),
        ({"data": np.zeros((3, 192), np.uint8)}, r"mixes images of \[8, 16\] pixels"),
        ({"data": print}, "asks for .*print, which no array needs"),
    ],
)
def test_unfit_batches(tree, change, message):
    source, _ = tree(train_data_batch_2=change)
    with pytest.raises(ValueError, match=message):
        imagenet32.load(source)


def test_missing_batches(tree, tmp_path, capsys):
    source, _ = tree()
    (source / "train_data_batch_7").unlink()
    assert main(["imagenet32", "--source", str(source), "--output", str(tmp_path / "out")]) == 2
    assert "train_data_batch_7 is missing" in capsys.readouterr().err
    assert main(["imagenet32", "--source", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "does not hold train_data_batch_1; unpack Imagenet32_train.zip" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
