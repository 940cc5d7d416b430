"""Named arrays of a user's own, in HDF5 files of any layout or in .npz files: inputs and targets, of any numeric type and shape.

Several files are one source, whose samples follow each other. The test split is a share of the samples that is chosen at
random, or comes from files of its own.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.array_files import ArrayFiles
from data_prep.source import Source
from hvdlocal.communicator import Communicator, succeed_together
from hvdlocal.data import ArrayWriter
from hvdlocal.data.format.manifest import Manifest, sha256_of_json
from hvdlocal.data.permutations import held_out
from hvdlocal.data.read.hdf5_inspection import refuse_trained_on
from hvdlocal.data.read.named_arrays import NamedArrays

SUMMARY = "named arrays of your own, inputs and targets, from HDF5 files of any layout or .npz files"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    command.add_argument("--source", type=Path, nargs="+", required=True, metavar="FILE", help="HDF5 or .npz files")
    command.add_argument(
        "--inputs",
        required=True,
        metavar="NAME[,NAME…]",
        help="names of the arrays of inputs, (samples, …) each; of HDF5 with their groups: fields/density",
    )
    command.add_argument("--targets", required=True, metavar="NAME[,NAME…]", help="names of the arrays of targets")
    testing = command.add_mutually_exclusive_group()
    testing.add_argument(
        "--holdout", type=float, metavar="SHARE", help="make a test split of this share, chosen at random by --seed"
    )
    testing.add_argument(
        "--test-source", type=Path, nargs="+", metavar="FILE", help="files of test samples, with the same arrays"
    )
    command.add_argument(
        "--keep-nonfinite", action="store_true", help="keep numbers that are NaN or infinite (default: refuse them)"
    )


@dataclass(frozen=True)
class ArraySplit:
    """Some samples of the files.

    Attributes:
        files: the arrays.
        rows: int64 (n,), which samples.
    """

    files: ArrayFiles
    rows: NDArray[np.int64]

    @property
    def num_samples(self) -> int:
        """See `Split`."""
        return len(self.rows)

    @property
    def size(self) -> int:
        """See `Split`."""
        return self.num_samples * self.files.sample_bytes

    def write(
        self, directory: Path, split: str, preparation: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Manifest:
        """See `Split`."""
        source = self.files.source
        arrays = {name: self.files.rows(name, self.rows) for name in source.names}
        identity = sha256_of_json({"files": self.files.identity, "preparation": preparation, "split": split})
        writer = ArrayWriter(
            directory, split, inputs=source.inputs, targets=source.targets, keep_nonfinite=True, **options
        )  # what is not finite was looked for before
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that are kept, which the remarks name
            return writer.write(arrays, identity=identity, preparation=preparation)


def open_source(arguments: argparse.Namespace, communicator: Communicator) -> Source:
    """Opens the data set; a collective, in which the ranks share out the reading.

    Raises:
        FileNotFoundError, ValueError: see `ArrayFiles`; or there are numbers that are not finite, and they are not kept.
    """
    with ExitStack() as opened:
        files = {"train": _open(arguments.source, ".unpacked", arguments, communicator, opened)}
        if arguments.test_source is not None:
            files["test"] = _open(arguments.test_source, ".unpacked-test", arguments, communicator, opened)
            if files["test"].samples != files["train"].samples:
                raise ValueError(
                    f"--test-source holds samples of {files['test'].samples}, and --source of {files['train'].samples}; bring "
                    "both to the same types and shapes"
                )
            named = files["train"].named, files["test"].named
            succeed_together(communicator, lambda: refuse_trained_on(*named), "data.test_source")
        preparation: dict[str, Any] = {"data_set": "arrays"}
        splits = {name: ArraySplit(content, np.arange(len(content))) for name, content in files.items()}
        remarks = [f"{packed}: unpacked once" for content in files.values() if (packed := content.packed)]
        if arguments.holdout is not None:
            share, seed, train = arguments.holdout, arguments.seed, files["train"]
            mask = held_out(seed, np.zeros(len(train), np.int32), share)
            splits = {
                "train": ArraySplit(train, np.flatnonzero(~mask)),
                "test": ArraySplit(train, np.flatnonzero(mask)),
            }
            preparation["holdout"] = {"share": share, "seed": seed, "from": "train"}
            remarks.append(f"test: {mask.sum()} of {len(train)} samples, held out at random by seed {seed}")
        elif "test" not in files:
            remarks.append("there is no test split; --holdout or --test-source makes one")
        remarks += [f"kept: {text}" for content in files.values() for text in content.nonfinite.values()]
        return Source(splits, preparation, remarks, opened.pop_all().close)


def _open(
    paths: Sequence[Path], scratch: str, arguments: argparse.Namespace, communicator: Communicator, opened: ExitStack
) -> ArrayFiles:
    source = NamedArrays.of(paths, arguments.inputs, arguments.targets)
    files = ArrayFiles(source, arguments.output / scratch, communicator)
    opened.callback(files.close)
    if files.nonfinite and not arguments.keep_nonfinite:
        raise ValueError(
            f"{'; '.join(files.nonfinite.values())}: mend or remove them, or keep them with --keep-nonfinite"
        )
    return files
