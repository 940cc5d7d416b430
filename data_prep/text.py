"""Text for language models: the bytes of some files, or the token ids that a tokenizer of the tokenizers library makes of them.

The files follow each other in the order in which they are named, with nothing in between; where a separator is wanted, it is
in the text (a tokenizer recognises its special tokens there). The end of every file is held out, so that the test split
has some of each.

A tokenizer gets the text in pieces of at most 1 MiB that end with a line. At their ends, tokens may be others than if all
of the text were tokenized at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.source import Source, Split
from data_prep.text_tokens import Piece, TextTokens, cut_text
from data_prep.tokenizer import BYTES, Tokenizer, open_tokenizer
from hvdlocal.communicator import Communicator, succeed_together
from hvdlocal.data import TokenWriter
from hvdlocal.data.format.manifest import Manifest
from hvdlocal.data.kinds.tokens import rows_of

SUMMARY = "text files, as tokens for language models"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    command.add_argument("--source", type=Path, required=True, nargs="+", metavar="FILE", help="text files")
    command.add_argument(
        "--tokenizer",
        default=BYTES,
        metavar="bytes|FILE",
        help="bytes: every byte is a token; or a JSON file of the tokenizers library (default: %(default)s)",
    )
    command.add_argument(
        "--block",
        type=int,
        default=256,
        metavar="T",
        help="tokens of a sequence, unless training chooses another number (default: %(default)s)",
    )
    command.add_argument(
        "--holdout",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of each file, its end, that becomes the test split; 0 for none (default: %(default)s)",
    )


def open_source(arguments: argparse.Namespace, communicator: Communicator) -> Source:
    """Opens the files; a collective, in which the ranks share out the work of counting tokens. Errors: see `load`."""
    return load(arguments.source, arguments.tokenizer, arguments.block, arguments.holdout, communicator)


def load(files: Sequence[Path], tokenizer_name: str, block: int, holdout: float, communicator: Communicator) -> Source:
    """Opens text files; a collective.

    Args:
        files: the files, in the order in which they follow each other.
        tokenizer_name: "bytes", or the path of a JSON file of the tokenizers library.
        block: tokens of a sequence.
        holdout: share of each file that becomes the test split.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is empty, comes twice, or is not UTF-8 where a tokenizer needs that; the tokenizer cannot be used, or
            has no token for some text; or an option is out of range.
    """

    def opened() -> tuple[Tokenizer, dict[str, list[Piece]]]:
        if block < 1:
            raise ValueError(f"--block {block}: a sequence has at least one token")
        if not 0 <= holdout < 1:
            raise ValueError(f"--holdout {holdout}: choose a share from 0 to less than 1, for instance 0.1")
        tokenizer = open_tokenizer(tokenizer_name)
        cuts = [cut_text(file, holdout) for file in files]
        _refuse_twice(files)
        pieces = {"train": [piece for train, _ in cuts for piece in train]}
        if holdout:
            pieces["test"] = [piece for _, test in cuts for piece in test]
        return tokenizer, pieces

    tokenizer, pieces = succeed_together(communicator, opened, "data.source")
    splits: dict[str, Split] = {}
    remarks = []
    for name, some in pieces.items():
        tokens = TextTokens(some, tokenizer, communicator)
        if len(tokens) <= block:
            raise ValueError(
                f"the {name} split has {len(tokens)} tokens, fewer than a sequence of {block} and the token after it: choose a "
                "smaller --block, another --holdout, or more text"
            )
        if tokens.represented_bytes != tokens.text_bytes:
            remarks.append(
                f"the tokens of the {name} split stand for {tokens.represented_bytes} bytes, but its text has "
                f"{tokens.text_bytes}: the tokenizer changes or drops characters, or the text holds special tokens"
            )
        splits[name] = TokenSplit(tokens, tokenizer, block)
    facts = {"data_set": "text", "holdout": holdout, **tokenizer.description}
    return Source(splits, facts, remarks)


def _refuse_twice(files: Sequence[Path]) -> None:
    """Raises ValueError for a file that comes twice, under the same name or another."""
    seen: dict[tuple[int, int], Path] = {}
    for path in files:
        found = path.stat()
        place = found.st_dev, found.st_ino
        if first := seen.get(place):
            names = f"{first} is named twice" if first == path else f"{first} and {path} are the same file"
            raise ValueError(f"--source: {names}, so its text would come twice in an epoch; name every file once")
        seen[place] = path


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of some text.

    Attributes:
        tokens: the tokens.
        tokenizer: what made them.
        block: tokens of a sequence.
    """

    tokens: TextTokens
    tokenizer: Tokenizer
    block: int

    @property
    def num_samples(self) -> int:
        """See `Split`."""
        return rows_of(len(self.tokens))

    @property
    def size(self) -> int:
        """See `Split`."""
        return len(self.tokens) * self.tokens.dtype.itemsize

    def write(
        self, directory: Path, split: str, preparation: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Manifest:
        """See `Split`."""
        writer = TokenWriter(directory, split, **options)
        return writer.write(
            self.tokens,
            self.tokenizer.token_bytes,
            block=self.block,
            identity=self.tokens.identity,
            preparation=preparation,
        )
