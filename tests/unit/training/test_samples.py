"""The samples that a configuration names: data sets, and a user's own files with or without test samples."""

import json
import shutil

import h5py
import numpy as np
import pytest

import hvdlocal
from hvdlocal.communicator import SingleProcess
from hvdlocal.training.config import DataConfig, ModelConfig, TrainConfig
from hvdlocal.training.samples import count_samples, open_samples

X = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
Y = np.arange(50.0)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "mine.h5")


def write(path, x=X, y=Y):
    with h5py.File(path, "w") as file:
        file["x"], file["y"] = x, y
    return path


def counted(task="regression", **data):
    return count_samples(TrainConfig(DataConfig(**data), ModelConfig("own:Net"), "out", task=task))


def opened(task="regression", with_test_data=True, **data):
    config = TrainConfig(DataConfig(**data), ModelConfig("own:Net"), "out", task=task)
    return open_samples(config, SingleProcess(), with_test_data)


def energies(samples):
    return samples.take(np.arange(len(samples)))["y"]


def test_a_tenth_is_tested_on_unless_another_share_is_given(path):
    for options, count in (({}, 5), ({"holdout": 0.3}, 15)):
        data = {"path": str(path), "inputs": "x", "targets": "y", **options}
        train, test = opened(**data)
        assert (len(train), len(test)) == (50 - count, count)
        assert counted(**data) == 50 - count
        assert sorted([*energies(train), *energies(test)]) == Y.tolist()
        again = opened(**data, with_test_data=False)
        assert again[1] is None
        assert again[0].fingerprint == train.fingerprint


def test_a_file_to_test_on_and_a_pattern_of_files(tmp_path, path):
    for number in range(3):
        write(tmp_path / f"part{number}.h5", X[10 * number :][:10], Y[10 * number :][:10])
    data = {"path": str(tmp_path / "part*.h5"), "inputs": "x", "targets": "y", "test_path": str(path)}
    train, test = opened(**data)
    np.testing.assert_array_equal(energies(train), Y[:30])
    np.testing.assert_array_equal(energies(test), Y)
    assert counted(**data) == 30


def test_the_same_share_as_when_it_is_prepared(tmp_path, path):
    from data_prep.__main__ import main

    command = ["arrays", "--source", path, "--inputs", "x", "--targets", "y", "--holdout", "0.1", "--output", tmp_path]
    assert main(list(map(str, command))) == 0
    _, test = opened(path=str(path), inputs="x", targets="y")
    prepared = opened(path=str(tmp_path))[1]
    assert sorted(energies(prepared)) == energies(test).tolist()


def test_a_test_split_that_was_held_out_of_another_training_split(tmp_path, path):
    """Such as is left when a second preparation is interrupted between the splits, or both were copied together."""
    from data_prep.__main__ import main

    arrays = ["arrays", "--source", str(path), "--inputs", "x", "--targets", "y", "--output"]
    assert main([*arrays, str(tmp_path / "a"), "--holdout", "0.1"]) == 0
    for name, options in (("b", ["--holdout", "0.1", "--seed", "1"]), ("c", []), ("d", ["--holdout", "0.1"])):
        assert main([*arrays, str(tmp_path / name), *options]) == 0
    message = "the test split was held out of another train split .* so this one may contain its samples: prepare both"
    for name in "bc":
        shutil.rmtree(tmp_path / name / "test", ignore_errors=True)
        shutil.copytree(tmp_path / "a" / "test", tmp_path / name / "test")
        with pytest.raises(ValueError, match=message):
            opened(path=str(tmp_path / name))
    assert len(opened(path=str(tmp_path / "d"))[1]) == 5


def test_images_with_classes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)
    path = str(write(tmp_path / "a.h5", images, np.arange(50) % 2))
    train, test = opened("image-classification", path=path, inputs="x", targets="y")
    assert (train.kind, train.shape, train.classes) == ("images", (8, 8, 1), ("0", "1"))
    assert np.bincount(test.labels).tolist() == [3, 3]
    other = str(write(tmp_path / "b.h5", images[:9], np.zeros(9, int)))
    train, test = opened("image-classification", path=path, inputs="x", targets="y", test_path=other)
    assert test.classes == train.classes
    with pytest.raises(ValueError, match="takes one array of images and one of labels"):
        opened("image-classification", path=path, inputs="x,z", targets="y")


def test_as_many_images_are_counted_as_a_run_has(tmp_path):
    images = np.ones((150, 4, 4, 3), np.uint8)
    images[::2] = 2
    path = str(
        write(tmp_path / "a.h5", images, np.repeat(np.arange(10), 15))
    )  # a tenth of 15 is two of each class, not 1.5
    for options in ({}, {"holdout": 0.3}, {"test_path": str(write(tmp_path / "b.h5", images, np.zeros(150, int)))}):
        data = {"path": path, "inputs": "x", "targets": "y", **options}
        train, _ = opened("image-classification", **data)
        assert counted("image-classification", **data) == len(train)


def test_files_that_are_both_to_train_on_and_to_test_on(tmp_path, path):
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    (tmp_path / "b.npz").symlink_to(tmp_path / "a.npz")
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["x"], file["y"] = h5py.ExternalLink("mine.h5", "/x"), h5py.ExternalLink("mine.h5", "/y")
    for train, test in (("a.npz", "a.npz"), ("a.npz", "b.npz"), ("mine.h5", "link.h5")):
        with pytest.raises(ValueError, match="both to train on and to test on; name other files to test on"):
            opened(path=str(tmp_path / train), inputs="x", targets="y", test_path=str(tmp_path / test))
    images = str(write(tmp_path / "images.h5", np.ones((9, 8, 8, 3), np.uint8), np.arange(9) % 2))
    with h5py.File(images, "a") as file:
        file["x"][0] = 2
    with pytest.raises(ValueError, match=r"images.h5 is both to train on and to test on"):
        opened("image-classification", path=images, inputs="x", targets="y", test_path=images)


def test_what_cannot_be_the_source(tmp_path):
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    np.save(tmp_path / "a.npy", X)
    for task, name, options, message in (
        ("image-classification", "a.npz", {}, "a NumPy file, but images and labels are read from HDF5 files only"),
        ("image-classification", "a.npy", {}, "a NumPy file, but images and labels are read from HDF5 files only"),
        ("regression", "a.npy", {}, "is a .npy file, whose array has no name: write it with numpy.savez or h5py"),
        ("regression", "a.npz", {"inputs": "[x, y]"}, r"data.inputs=\[x, y\] is a list: write the names with commas"),
        ("regression", "a.npz", {"targets": "[y]"}, r"data.targets=\[y\] is a list: write the names with commas"),
    ):
        data = {"path": str(tmp_path / name), "inputs": "x", "targets": "y", **options}
        for use in (opened, counted):
            with pytest.raises(ValueError, match=message):
                use(task, **data)


def test_test_samples_of_another_type(tmp_path, path):
    other = write(tmp_path / "b.h5", X.astype(np.float64))
    message = r"the training samples are x float32 \(4,\), y float64 \(\), but the test samples x float64 \(4,\)"
    with pytest.raises(ValueError, match=message):
        opened(path=str(path), inputs="x", targets="y", test_path=str(other))


def test_a_data_set_is_opened_as_before(tmp_path):
    images = np.zeros((8, 4, 4, 1), np.uint8)
    for split in ("train", "test"):
        hvdlocal.ShardWriter(tmp_path, split, classes=["a"]).write(images, np.zeros(8, int))
    train, test = opened("image-classification", path=str(tmp_path))
    assert (train.kind, len(train), len(test)) == ("images", 8, 8)


def test_a_loss_that_is_not_finite_is_null_in_the_records(tmp_path, monkeypatch):
    """A number of the user's that is NaN reaches the test loss, and no further."""
    from hvdlocal.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hvdlocal.communicator.launch._current", SingleProcess())
    test = X.copy()
    test[3, 0] = np.nan
    write(tmp_path / "train.h5", y=np.ones((50, 3)))
    write(tmp_path / "test.h5", test, np.ones((50, 3)))
    settings = {"path": "train.h5", "inputs": "x", "targets": "y", "test_path": "test.h5", "batch_size": 16}
    given = [f"--data.{name}={value}" for name, value in settings.items()]
    (tmp_path / "run.yaml").write_text("task: regression\nmodel: {name: 'torch.nn:Linear'}\n")
    model = ["--model.arguments={in_features: 4, out_features: 3}", "--output=out", "--epochs=1"]
    assert main(["train", "run.yaml", *given, *model]) == 0
    for line in (
        *(tmp_path / "out/metrics.jsonl").read_text().splitlines(),
        (tmp_path / "out/summary.json").read_text(),
    ):
        json.loads(line, parse_constant=pytest.fail)
    assert json.loads((tmp_path / "out/summary.json").read_text())["evaluation"]["loss"] is None
