"""The samples that a configuration names: a data set in hvdlocal's format, or a user's own files as they are."""

from __future__ import annotations

import glob
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from hvdlocal.communicator import Communicator, SingleProcess, succeed_together
from hvdlocal.data import ShardedDataset, open_arrays, open_hdf5
from hvdlocal.data.format.held_out import refuse_other_preparation
from hvdlocal.data.permutations import held_out_count
from hvdlocal.data.read.dataset import StoredSamples
from hvdlocal.data.read.hdf5_inspection import refuse_trained_on
from hvdlocal.data.read.named_arrays import NamedArrays, find_arrays
from hvdlocal.data.read.selected import hold_out
from hvdlocal.data.read.user_arrays import UserArrays
from hvdlocal.data.read.user_hdf5 import HDF5Dataset
from hvdlocal.data.read.user_hdf5_file import inspect_file
from hvdlocal.training.config import DataConfig, TrainConfig

DEFAULT_HOLDOUT = 0.1
"""Share of a user's own files that is tested on, unless there are files to test on."""

HOLDOUT_SEED = 0
"""Not the run's: all runs on a file test on the same samples, those of `python -m data_prep arrays --holdout`."""


def open_samples(
    config: TrainConfig, communicator: Communicator, with_test_data: bool = True
) -> tuple[StoredSamples, StoredSamples | None]:
    """Opens the training samples and, if they are wanted, the test samples; a collective.

    Raises:
        SetupError: there are no such data, or they cannot be opened; on all ranks.
    """
    data = config.data
    succeed_together(communicator, lambda: check_source(data), "hvdlocal.data.source")
    with ExitStack() as opened:
        train, test = _open(config, communicator, with_test_data, opened)
        if test is not None and train.kind == test.kind == "arrays" and train.facts["arrays"] != test.facts["arrays"]:
            raise ValueError(
                f"the training samples are {_description(train)}, but the test samples {_description(test)}: bring both to the "
                "same names, types and shapes"
            )
        opened.pop_all()
    return train, test


def _open(
    config: TrainConfig, communicator: Communicator, with_test_data: bool, opened: ExitStack
) -> tuple[StoredSamples, StoredSamples | None]:
    data = config.data
    if data.inputs is None:
        train = ShardedDataset(
            data.path,
            data.train_split,
            storage=data.storage,
            share=data.share,
            communicator=communicator,
            block=data.block,
        )
        opened.callback(train.close)
        if not with_test_data:
            return train, None
        test = ShardedDataset(data.path, data.test_split, communicator=communicator, block=data.block)
        refuse_other_preparation(train.manifest, test.manifest)
        return train, test
    whole = _open_files(config, data.path, communicator)
    opened.callback(whole.close)
    if data.test_path is None:
        share = _holdout(data)
        split = succeed_together(communicator, lambda: hold_out(whole, share, HOLDOUT_SEED), "hvdlocal.data.holdout")
        return split[0], split[1] if with_test_data else None
    if not with_test_data:
        return whole, None
    classes = whole.classes if whole.kind == "images" else None
    test_samples = _open_files(config, data.test_path, communicator, classes)
    succeed_together(
        communicator, lambda: refuse_trained_on(whole.named, test_samples.named), "hvdlocal.data.test_path"
    )
    return whole, test_samples


def count_samples(config: TrainConfig) -> int:
    """Returns the number of training samples in a user's own files, of which it reads no more than labels of images.

    Raises:
        FileNotFoundError, ValueError: see `open_arrays` and `open_hdf5`.
    """
    data = config.data
    check_source(data)
    files, inputs, targets = _files(data.path), data.inputs or "", data.targets or ""
    if config.task == "image-classification":
        _check_names_of_images(data)
        images = [inspect_file(Path(path), inputs.strip("/"), targets.strip("/"), "auto") for path in files]
        sizes = np.bincount(
            np.concatenate([file.labels for file in images])
        ).tolist()  # a share of each class is held out
    else:
        arrays = find_arrays(NamedArrays.of(files, inputs, targets), SingleProcess())
        sizes = [sum(file.num_samples for file in arrays)]
    return sum(size if data.test_path is not None else size - held_out_count(size, _holdout(data)) for size in sizes)


def check_source(data: DataConfig) -> None:
    """Checks what can be said about the source of the samples before it is opened.

    Raises:
        ValueError: settings contradict each other, or what the path names.
    """
    path = Path(data.path)
    for setting, names in (("data.inputs", data.inputs), ("data.targets", data.targets)):
        if names is not None and names.startswith("["):
            raise ValueError(f"{setting}={names} is a list: write the names with commas between them, as in x,y")
    if data.inputs is None:
        if data.targets is not None:
            raise ValueError(f"data.targets={data.targets} without data.inputs: name the arrays of inputs, too")
        if path.is_file():
            raise ValueError(
                f"data.path={data.path} is a file: name its arrays with data.inputs and data.targets, or make a data set of it "
                "with python -m data_prep arrays"
            )
        return
    if data.targets is None:
        raise ValueError(f"data.inputs={data.inputs} without data.targets: name the arrays of targets, too")
    if path.is_dir():
        raise ValueError(
            f"data.path={data.path} is a directory, and data.inputs={data.inputs} an array in a file: name the file"
        )
    if data.test_path is not None and data.holdout is not None:
        raise ValueError(
            f"data.holdout={data.holdout:g} and data.test_path={data.test_path} are two ways to get test samples: choose one"
        )


def _open_files(
    config: TrainConfig, path: str, communicator: Communicator, classes: tuple[str, ...] | None = None
) -> UserArrays | HDF5Dataset:
    data = config.data
    files = succeed_together(communicator, lambda: _files(path), "hvdlocal.data.names")
    assert data.inputs is not None
    assert data.targets is not None
    if config.task != "image-classification":
        return open_arrays(
            files, data.inputs, data.targets, storage=data.storage, share=data.share, communicator=communicator
        )
    succeed_together(communicator, lambda: _check_names_of_images(data), "hvdlocal.data.image_names")
    return open_hdf5(
        files, data.inputs, data.targets, classes, storage=data.storage, share=data.share, communicator=communicator
    )


def _check_names_of_images(data: DataConfig) -> None:
    if "," in f"{data.inputs}{data.targets}":
        raise ValueError(
            f"data.inputs={data.inputs} and data.targets={data.targets}: task image-classification takes one array of images and "
            "one of labels"
        )


def _description(samples: StoredSamples) -> str:
    return ", ".join(f"{array['name']} {array['dtype']} {array['shape']}" for array in samples.facts["arrays"])


def _files(path: str) -> list[str]:
    """The files that a path or a pattern, such as "fields/*.h5", names."""
    found = [path] if Path(path).exists() else sorted(glob.glob(path))
    if not found:
        raise FileNotFoundError(f"{path} does not exist; name a file, or several by a pattern such as 'fields/*.h5'")
    return found


def _holdout(data: DataConfig) -> float:
    return DEFAULT_HOLDOUT if data.holdout is None else data.holdout
