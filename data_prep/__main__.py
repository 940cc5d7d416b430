"""``python -m data_prep {digits,cifar10} --output DIR`` writes a data set, ``python -m data_prep verify DIR`` checks
one.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep import cifar10, digits
from data_prep.source import Source
from hvdlocal.data.writer import ShardWriter, verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 after one sentence on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "verify":
            for split, num_samples in verify(arguments.directory).items():
                print(f"{split}: {num_samples} samples, all checksums agree")
        else:
            source = cifar10.load(arguments.source) if arguments.command == "cifar10" else digits.load()
            _write(source, arguments)
    except (ValueError, OSError) as error:
        print(f"data_prep: {error}", file=sys.stderr)
        return 2
    return 0


def _write(source: Source, arguments: argparse.Namespace) -> None:
    for split, (images, labels) in source.splits.items():
        writer = ShardWriter(
            arguments.output,
            split,
            classes=source.classes,
            num_shards=arguments.shards,
            seed=arguments.seed,
            overwrite=arguments.overwrite,
        )
        manifest = writer.write(images, labels)
        print(f"{writer.directory}: {manifest.num_samples} samples, fingerprint {manifest.fingerprint}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description="Write data sets as HDF5 shards.")
    commands = parser.add_subparsers(dest="command", required=True)

    writing = argparse.ArgumentParser(add_help=False)
    writing.add_argument(
        "--output", type=Path, required=True, help="directory of the data set; a directory per split in it"
    )
    writing.add_argument("--shards", type=int, default=1, help="files per split (default: %(default)s)")
    writing.add_argument("--seed", type=int, default=0, help="seed of the shuffle on disk (default: %(default)s)")
    writing.add_argument("--overwrite", action="store_true", help="replace a different data set that is there")

    commands.add_parser("digits", parents=[writing], help="scikit-learn's handwritten digits, 8x8")
    cifar = commands.add_parser("cifar10", parents=[writing], help="CIFAR-10, 32x32, from its unpacked archive")
    cifar.add_argument("--source", type=Path, required=True, help="directory with data_batch_1.bin (or data_batch_1) …")

    check = commands.add_parser("verify", help="compare all checksums of all splits")
    check.add_argument("directory", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
