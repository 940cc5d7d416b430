"""`hvdlocal prepare DATA_SET --output DIR` writes a data set, `hvdlocal prepare verify DIR` checks one; both also as the
ranks of one job: `mpirun -np N hvdlocal prepare …`. `python -m data_prep` is the same command.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from data_prep.arguments import DATA_SETS, build_parser
from data_prep.progress import ProgressBar
from data_prep.source import Source
from hvdlocal import terminal
from hvdlocal.communicator import (
    CollectiveTimeoutError,
    CommunicationError,
    Communicator,
    SingleProcess,
    init,
    launched_size,
    require_agreement,
    succeed_together,
)
from hvdlocal.data import BadSamplesError, verify
from hvdlocal.data.format.held_out import refuse_left_splits
from hvdlocal.data.format.manifest import MANIFEST_NAME, Manifest
from hvdlocal.exit_codes import ExitCode

_SHARD_BYTES = 512 << 20  # few enough files for a parallel file system, enough of them to be copied side by side


def main(argv: Sequence[str] | None = None, prog: str = "python -m data_prep") -> int:
    """Runs the command line.

    Args:
        argv: the arguments, by default those of the process.
        prog: how the user calls the command, for its help.

    Returns:
        An `ExitCode`, after one sentence on stderr where it is not 0.
    """
    with terminal.guarded(lasting=True):  # what is written is the data set; nobody need read how far it is
        return _main(argv, prog)


def _main(argv: Sequence[str] | None, prog: str) -> int:
    try:
        communicator = _join()
    except (ImportError, RuntimeError, ValueError) as error:
        _say(str(error))
        return ExitCode.MISTAKE
    warnings.filterwarnings("ignore", module="PIL")  # of odd EXIF data, which are not used
    try:
        return _run(argv, prog, communicator)
    except CommunicationError as error:  # it cannot be known whether rank 0 hears of it
        _say(str(error))
        if isinstance(error, CollectiveTimeoutError):
            communicator.abort(ExitCode.PEER_FAILED)  # an orderly end would wait for the rank that did not come
        return ExitCode.PEER_FAILED


def _run(argv: Sequence[str] | None, prog: str, communicator: Communicator) -> int:
    talks = communicator.rank == 0
    try:
        arguments = build_parser(prog, talks).parse_args(argv)
        require_agreement(communicator, _settings(arguments), "data.command")
        if arguments.command == "verify":
            _verify(arguments.directory, communicator, talks)
        else:
            _write(arguments, communicator, talks)
    except KeyboardInterrupt:
        if communicator.size > 1:
            raise  # which ends the other ranks too
        _say("interrupted; the same command goes on from here")
        return ExitCode.STOPPED
    except (ValueError, OSError) as error:
        if talks:
            _say(terminal.plain(error) if isinstance(error, OSError) else str(error))
        communicator.barrier("data.end")  # the launcher ends all as soon as one fails, and rank 0 must be heard
        return ExitCode.MISTAKE
    return ExitCode.FINISHED


def _say(message: str) -> None:
    sys.stderr.write(f"data_prep: {message}\n")  # one write: print() may send the end of a line by itself
    sys.stderr.flush()


def _join() -> Communicator:
    """The other ranks, if a launcher started any; a process by itself needs no MPI."""
    return init("mpi4py") if (launched_size() or 1) > 1 else SingleProcess()


def _settings(arguments: argparse.Namespace) -> dict[str, str]:
    return {name: str(value) for name, value in vars(arguments).items()}


def _verify(directory: Path, communicator: Communicator, talks: bool, splits: Sequence[str] | None = None) -> None:
    for split in verify(directory, communicator=communicator, splits=splits):
        if talks:
            manifest = Manifest.load(directory / split / MANIFEST_NAME)
            print(f"{split}: {manifest.contents}, all checksums agree", flush=True)


def _write(arguments: argparse.Namespace, communicator: Communicator, talks: bool) -> None:
    if arguments.command in ("folder", "imagenet"):
        succeed_together(communicator, lambda: _check_outside(arguments.output, arguments.source), "data.output")
    with closing(DATA_SETS[arguments.command].open_source(arguments, communicator)) as source:
        _write_splits(source, arguments, communicator, talks)


def _write_splits(source: Source, arguments: argparse.Namespace, communicator: Communicator, talks: bool) -> None:
    if arguments.command in ("folder", "imagenet"):
        for split in source.splits:
            outside = partial(_check_outside, arguments.output / split, arguments.source)
            succeed_together(communicator, outside, "data.output")
    succeed_together(communicator, lambda: refuse_left_splits(arguments.output, source.splits), "data.left_splits")
    if talks:
        for remark in source.remarks:
            print(remark, file=sys.stderr, flush=True)
    refusals = []
    for split in source.splits:
        try:
            _write_split(source, split, arguments, communicator, talks)
        except BadSamplesError as error:  # the other splits are tried too, so that one run tells all
            refusals.append(error)
    if refusals:
        raise ValueError("; ".join(str(refusal) for refusal in refusals))
    if arguments.verify:
        _verify(arguments.output, communicator, talks, list(source.splits))


def _check_outside(directory: Path, source: Path) -> None:
    """Refuses to write into a tree of images, which would be another tree from then on."""
    if source.is_dir() and directory.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--output lies inside --source ({directory} in {source}); choose a directory outside of it")


def _write_split(
    source: Source, split: str, arguments: argparse.Namespace, communicator: Communicator, talks: bool
) -> None:
    content = source.splits[split]
    options = {
        "num_shards": _num_shards(content.size, content.num_samples) if arguments.shards is None else arguments.shards,
        "seed": arguments.seed,
        "overwrite": arguments.overwrite,
        "communicator": communicator,
    }
    with ProgressBar(split, content.num_samples, talks) as progress:
        manifest = content.write(arguments.output, split, source.preparation, {**options, "progress": progress})
    if talks:
        left_out = manifest.preparation.get("left_out", 0)
        print(
            f"{arguments.output / split}: {manifest.contents} in {len(manifest.shards)} "
            f"shard{'s' if len(manifest.shards) > 1 else ''}"
            + (f" ({left_out} bad ones left out, see bad_files.txt)" if left_out else "")
            + "".join(f", {count} {note}" for note, count in manifest.preparation.get("notes", {}).items())
            + f", fingerprint {manifest.fingerprint}",
            flush=True,
        )


def _num_shards(num_bytes: int, num_samples: int) -> int:
    return max(1, min(round(num_bytes / _SHARD_BYTES), num_samples))


if __name__ == "__main__":
    sys.exit(main())
