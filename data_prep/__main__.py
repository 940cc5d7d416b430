"""``python -m data_prep DATA_SET --output DIR`` writes a data set, ``python -m data_prep verify DIR`` checks one; both
also as the ranks of one job: ``mpirun -np N python -m data_prep …``.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from data_prep import cifar10, cifar100, digits, folder, imagenet, imagenet32, synthetic
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
from hvdlocal.data.write.writer import BadSamplesError, JpegShardWriter, ShardWriter, verify
from hvdlocal.exit_codes import ExitCode

_SHARD_BYTES = 512 << 20  # few enough files for a parallel file system, enough of them to be copied side by side


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns an `ExitCode`, after one sentence on stderr where it is not 0."""
    with terminal.guarded(lasting=True):  # what is written is the data set; nobody need read how far it is
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    try:
        communicator = _join()
    except (ImportError, RuntimeError, ValueError) as error:
        _say(str(error))
        return ExitCode.MISTAKE
    warnings.filterwarnings("ignore", module="PIL")  # of odd EXIF data, which are not used
    try:
        return _run(argv, communicator)
    except CommunicationError as error:  # it cannot be known whether rank 0 hears of it
        _say(str(error))
        if isinstance(error, CollectiveTimeoutError):
            communicator.abort(ExitCode.PEER_FAILED)  # an orderly end would wait for the rank that did not come
        return ExitCode.PEER_FAILED


def _run(argv: Sequence[str] | None, communicator: Communicator) -> int:
    talks = communicator.rank == 0
    try:
        arguments = _parser(talks).parse_args(argv)
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
    return {name: str(value) for name, value in vars(arguments).items() if name != "load"}


def _verify(directory: Path, communicator: Communicator, talks: bool, splits: Sequence[str] | None = None) -> None:
    for split, num_samples in verify(directory, communicator=communicator, splits=splits).items():
        if talks:
            print(f"{split}: {num_samples} samples, all checksums agree", flush=True)


def _write(arguments: argparse.Namespace, communicator: Communicator, talks: bool) -> None:
    if arguments.command in ("folder", "imagenet"):
        succeed_together(communicator, lambda: _check_outside(arguments.output, arguments.source), "data.output")
    source: Source = arguments.load(arguments, communicator)
    if arguments.command in ("folder", "imagenet"):
        for split in source.splits:
            outside = partial(_check_outside, arguments.output / split, arguments.source)
            succeed_together(communicator, outside, "data.output")
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
    """Refuse to write into a tree of images, which would be another tree from then on."""
    if source.is_dir() and directory.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--output lies inside --source ({directory} in {source}); choose a directory outside of it")


def _write_split(
    source: Source, split: str, arguments: argparse.Namespace, communicator: Communicator, talks: bool
) -> None:
    content = source.splits[split]
    options: dict[str, Any] = {
        "classes": source.classes,
        "num_shards": _num_shards(content.size, len(content.labels)) if arguments.shards is None else arguments.shards,
        "seed": arguments.seed,
        "overwrite": arguments.overwrite,
        "communicator": communicator,
    }
    with ProgressBar(split, len(content.labels), talks) as progress:
        facts = {"identity": content.identity, "preparation": source.preparation}
        writer: ShardWriter | JpegShardWriter
        if source.kind == "images":
            writer = ShardWriter(arguments.output, split, progress=progress, **options)
            manifest = writer.write(content.samples, content.labels, **facts)  # type: ignore[arg-type]
        else:
            skip = getattr(arguments, "bad", "refuse") == "skip"
            writer = JpegShardWriter(arguments.output, split, skip_bad=skip, progress=progress, **options)
            manifest = writer.write(content.samples, content.labels, names=content.names, **facts)  # type: ignore[arg-type]
    if talks:
        left_out = manifest.preparation.get("left_out", 0)
        print(
            f"{writer.directory}: {manifest.num_samples} samples in {len(manifest.shards)} "
            f"shard{'s' if len(manifest.shards) > 1 else ''}"
            + (f" ({left_out} bad ones left out, see bad_files.txt)" if left_out else "")
            + "".join(f", {count} {note}" for note, count in manifest.preparation.get("notes", {}).items())
            + f", fingerprint {manifest.fingerprint}",
            flush=True,
        )


def _num_shards(num_bytes: int, num_samples: int) -> int:
    return max(1, min(round(num_bytes / _SHARD_BYTES), num_samples))


class _Parser(argparse.ArgumentParser):
    """Says what it has to say on one rank only."""

    talks = True

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:  # type: ignore[override]
        if self.talks:
            super()._print_message(message, file)


def _parser(talks: bool) -> argparse.ArgumentParser:
    _Parser.talks = talks
    parser = _Parser(
        prog="python -m data_prep",
        description="Write data sets as HDF5 shards (docs/data-format.md). Under `mpirun -np N` the ranks share the work; "
        "the files are the same for any N. A run that was killed is finished by the same command.",
    )
    commands: Any = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    writing = _Parser(add_help=False)
    writing.add_argument(
        "--output", type=Path, required=True, help="directory of the data set; a directory per split in it"
    )
    writing.add_argument(
        "--shards", type=int, help="files per split (default: one per 512 MiB; unrelated to the number of ranks)"
    )
    writing.add_argument("--seed", type=int, default=0, help="seed of the shuffle on disk (default: %(default)s)")
    writing.add_argument("--overwrite", action="store_true", help="replace a different data set that is there")
    writing.add_argument("--verify", action="store_true", help="read everything again at the end and compare checksums")

    def add(
        name: str, what: str, load: Callable[[argparse.Namespace, Communicator], Source]
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, parents=[writing], help=what, description=what[:1].upper() + what[1:] + ".")
        command.set_defaults(load=load)
        return command

    def source(command: argparse.ArgumentParser, what: str) -> None:
        command.add_argument("--source", type=Path, required=True, metavar="DIR", help=what)

    add(
        "digits",
        "scikit-learn's handwritten digits, 8x8",
        lambda arguments, communicator: _local(communicator, digits.load),
    )
    command = add(
        "cifar10",
        "CIFAR-10, 32x32, from its unpacked archive, binary or Python version",
        lambda arguments, communicator: _local(
            communicator, partial(cifar10.load, arguments.source, arguments.pool, arguments.limit)
        ),
    )
    source(command, "directory with data_batch_1.bin (or data_batch_1) …")
    command.add_argument(
        "--pool", type=int, default=1, metavar="P", help="make each square of P x P pixels one, their mean"
    )
    command.add_argument(
        "--limit", type=int, metavar="N", help="take only the first N training images (their order is random)"
    )
    command = add(
        "cifar100",
        "CIFAR-100, 32x32, from its unpacked archive, binary or Python version",
        lambda arguments, communicator: _local(
            communicator, partial(cifar100.load, arguments.source, arguments.labels)
        ),
    )
    source(command, "directory with train.bin (or train) …")
    command.add_argument(
        "--labels", choices=("fine", "coarse"), default="fine", help="100 classes or 20 (default: %(default)s)"
    )
    command = add(
        "imagenet32",
        "downsampled ImageNet (also 8x8, 16x16 and 64x64), from its unpacked pickles",
        lambda arguments, communicator: _local(communicator, partial(imagenet32.load, arguments.source)),
    )
    source(command, "directory with train_data_batch_1 …, val_data and, for class names, map_clsloc.txt")

    def tree(command: argparse.ArgumentParser) -> None:
        source(command, "directory that holds train/<class>/… and val/<class>/…, or just <class>/…")
        command.add_argument(
            "--splits",
            nargs="+",
            default=(),
            metavar="NAME[=FOLDER]",
            help="splits and the folders of the source that hold them (default: those of train, val and test that there are; "
            "else the source itself is train)",
        )
        command.add_argument(
            "--resize",
            type=int,
            metavar="PIXELS",
            help="reduce the short side of larger images to this and encode them anew (default: keep the files as they are)",
        )
        command.add_argument(
            "--quality", type=int, default=90, help="JPEG quality with --resize, 1 to 100 (default: %(default)s)"
        )
        command.add_argument(
            "--bad",
            choices=("refuse", "skip"),
            default="refuse",
            help="files that cannot be decoded: refuse the data set after all have been tried, or leave them out; "
            "<output>/<split>/bad_files.txt lists them either way (default: %(default)s)",
        )

    command = add(
        "imagenet",
        "ImageNet, or any other tree of JPEG and PNG files with a folder per class, as JPEG files",
        lambda arguments, communicator: imagenet.load(
            arguments.source, arguments.splits, arguments.resize, arguments.quality, communicator
        ),
    )
    tree(command)
    command = add(
        "folder",
        "any tree of image files with a folder per class, as pixels without loss if they have one size, else as JPEG files",
        lambda arguments, communicator: folder.load(
            arguments.source,
            arguments.splits,
            arguments.images,
            arguments.resize,
            arguments.quality,
            arguments.bad == "skip",
            communicator,
        ),
    )
    command.add_argument(
        "--images",
        choices=("auto", "raw", "jpeg"),
        default="auto",
        help="raw: pixels, of files of one size; jpeg: JPEG files, as imagenet makes them; auto: raw if all are PNG or BMP files "
        "of one size, unless --resize or --bad skip is given (default: %(default)s)",
    )
    tree(command)
    command = add(
        "synthetic",
        "images made of numbers: a pattern per class under noise, for trying things out",
        lambda arguments, communicator: _local(
            communicator,
            partial(
                synthetic.load, arguments.samples, arguments.classes, arguments.size, arguments.seed, arguments.jpeg
            ),
        ),
    )
    command.add_argument(
        "--samples", type=int, default=10_000, help="to train on (default: %(default)s); a fifth to test"
    )
    command.add_argument("--classes", type=int, default=10, help="number of classes (default: %(default)s)")
    command.add_argument("--size", type=int, default=32, help="height and width in pixels (default: %(default)s)")
    command.add_argument(
        "--jpeg", action="store_true", help="write JPEG files of different sizes instead of raw pixels"
    )

    check = commands.add_parser("verify", help="compare all checksums of all splits")
    check.add_argument("directory", type=Path)
    return parser


def _local(communicator: Communicator, load: Callable[[], Source]) -> Source:
    """The source, which every rank opens for itself; if one cannot, none goes on."""
    return succeed_together(communicator, load, "data.source")


if __name__ == "__main__":
    sys.exit(main())
