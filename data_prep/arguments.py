"""The command line: one command per data set, and `verify`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from data_prep import arrays, cifar10, cifar100, digits, folder, imagenet, imagenet32, synthetic, text
from data_prep.source import Source
from hvdlocal.communicator import Communicator


class DataSet(Protocol):
    """What the module of a data set provides."""

    SUMMARY: str
    """The data set in one line, for the help."""

    def add_arguments(self, command: argparse.ArgumentParser) -> None:
        """Adds the options that only this data set has."""

    def open_source(self, arguments: argparse.Namespace, communicator: Communicator) -> Source:
        """Opens the data set for reading, a collective."""


DATA_SETS: Mapping[str, DataSet] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagenet32": imagenet32,
    "imagenet": imagenet,
    "folder": folder,
    "arrays": arrays,
    "text": text,
    "synthetic": synthetic,
}


def build_parser(prog: str = "hvdlocal prepare", talks: bool = True) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        prog: how the user calls the command.
        talks: whether help and mistakes are printed; of several ranks one prints them.
    """
    parser = _Parser(
        talks=talks,
        prog=prog,
        description="Write data sets as HDF5 shards (docs/data-format.md). Under `mpirun -np N` the ranks share the work; "
        "the files are the same for any N. A run that was killed is finished by the same command.",
    )
    parser_class: Any = partial(_Parser, talks=talks)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=parser_class)
    writing = _writing_options()
    for name, data_set in DATA_SETS.items():
        what = data_set.SUMMARY
        command = commands.add_parser(name, parents=[writing], help=what, description=what[:1].upper() + what[1:] + ".")
        data_set.add_arguments(command)
    check = commands.add_parser("verify", help="compare all checksums of all splits")
    check.add_argument("directory", type=Path)
    return parser


def _writing_options() -> argparse.ArgumentParser:
    """The options of all data sets."""
    writing = argparse.ArgumentParser(add_help=False)
    writing.add_argument(
        "--output", type=Path, required=True, help="directory of the data set; a directory per split in it"
    )
    writing.add_argument(
        "--shards", type=int, help="files per split (default: one per 512 MiB; unrelated to the number of ranks)"
    )
    writing.add_argument("--seed", type=int, default=0, help="seed of the shuffle on disk (default: %(default)s)")
    writing.add_argument("--overwrite", action="store_true", help="replace a different data set that is there")
    writing.add_argument("--verify", action="store_true", help="read everything again at the end and compare checksums")
    return writing


class _Parser(argparse.ArgumentParser):
    """A parser that can be silent."""

    def __init__(self, *, talks: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self._talks = talks

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:  # type: ignore[override]
        if self._talks:
            super()._print_message(message, file)
