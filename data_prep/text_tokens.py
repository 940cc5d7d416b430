"""The tokens of some text files, read where they are wanted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.tokenizer import Tokenizer, dtype_of
from hvdlocal.communicator import Communicator, succeed_together

PIECE_BYTES = 1 << 20
"""Text is tokenized in pieces of at most so many bytes, which end with a line where there is one."""

_LINE_BYTES = PIECE_BYTES // 16
"""How far before its largest end a piece may end with a line."""


@dataclass(frozen=True)
class Piece:
    """Some bytes of a file."""

    path: Path
    start: int
    stop: int

    def read(self) -> bytes:
        """Returns the bytes. Raises ValueError if the file has become shorter, OSError if it cannot be read."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            content = file.read(self.stop - self.start)
        if len(content) < self.stop - self.start:
            raise ValueError(f"{self.path} became shorter while it was read; run again when nobody writes it")
        return content


class TextTokens:
    """The tokens of pieces of text, end to end: a one-dimensional array that is computed piece by piece as it is read.

    Attributes:
        dtype: uint8, uint16 or uint32.
        text_bytes: bytes of the text.
        represented_bytes: bytes that the tokens stand for; others than `text_bytes` if the tokenizer changes the text.
        identity: hex sha256 of text and tokenizer.
    """

    def __init__(self, pieces: Sequence[Piece], tokenizer: Tokenizer, communicator: Communicator) -> None:
        """Tokenizes all of the text once, to count; a collective, in which the ranks share out the pieces.

        Raises:
            ValueError: some text is not UTF-8, and the tokenizer needs that it is; or it has no token for some text.
            OSError: a file cannot be read.
        """
        self._pieces, self._tokenizer = pieces, tokenizer
        self.dtype = dtype_of(len(tokenizer.token_bytes))
        self.text_bytes = sum(piece.stop - piece.start for piece in pieces)
        rank, size = communicator.rank, communicator.size
        mine = succeed_together(communicator, lambda: [self._count(piece) for piece in pieces[rank::size]], "data.text")
        everyone = communicator.gather(mine, "data.text_counts")
        counted = [everyone[number % size][number // size] for number in range(len(pieces))]
        self._starts = np.cumsum([0] + [count for count, _, _ in counted], dtype=np.int64)
        self.represented_bytes = sum(represented for _, represented, _ in counted)
        self.identity = hashlib.sha256(
            "".join([tokenizer.identity, *(digest for _, _, digest in counted)]).encode()
        ).hexdigest()
        self._latest: tuple[int, NDArray[Any]] = (-1, np.empty(0, self.dtype))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, wanted: slice) -> NDArray[Any]:
        """The tokens start..stop-1 of a slice without a step."""
        start, stop, _ = wanted.indices(len(self))
        parts = [np.empty(0, self.dtype)]
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while number < len(self._pieces) and (first := int(self._starts[number])) < stop:
            parts.append(self._tokens(number)[max(start - first, 0) : stop - first])
            number += 1
        return np.concatenate(parts)

    def _tokens(self, number: int) -> NDArray[Any]:
        """The tokens of a piece; those of the latest are kept, since whoever reads takes a few at a time, in order."""
        if self._latest[0] != number:
            piece = self._pieces[number]
            tokens = self._encode(piece, piece.read())
            if len(tokens) != self._starts[number + 1] - self._starts[number]:
                raise ValueError(f"{piece.path} was changed while it was read; run again when nobody writes it")
            self._latest = (number, tokens)
        return self._latest[1]

    def _count(self, piece: Piece) -> tuple[int, int, str]:
        """Returns the number of tokens of a piece, the bytes that they stand for, and the sha256 of its text."""
        content = piece.read()
        tokens = self._encode(piece, content)
        represented = int(self._tokenizer.token_bytes[tokens].sum(dtype=np.int64))
        return len(tokens), represented, hashlib.sha256(content).hexdigest()

    def _encode(self, piece: Piece, content: bytes) -> NDArray[Any]:
        try:
            return self._tokenizer.encode(content)
        except UnicodeDecodeError as error:
            offset = piece.start + error.start
            raise ValueError(
                f"{piece.path} is not UTF-8 at byte {offset} (0x{content[error.start]:02x}), which a tokenizer needs; convert "
                "it (iconv -t UTF-8), or choose --tokenizer bytes"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"{piece.path}: {error}; choose a tokenizer with a token for what it does not know, or --tokenizer bytes"
            ) from error


def cut_text(path: Path, holdout: float) -> tuple[list[Piece], list[Piece]]:
    """Cuts a file into the pieces to train with, and those of its end, which are held out.

    Args:
        path: the file.
        holdout: share of its bytes that is held out; the cut is moved back to where a character of UTF-8 begins.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file, or empty.
        OSError: it cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"--source {path}: there is no such file")
    if not path.is_file():
        raise ValueError(f"--source {path} is no regular file; name the text files themselves")
    size = path.stat().st_size
    if not size:
        raise ValueError(f"--source {path} is empty")
    with path.open("rb") as file:
        descriptor = file.fileno()
        cut = _character_start(descriptor, size - int(size * holdout))
        return _pieces(descriptor, path, 0, cut), _pieces(descriptor, path, cut, size)


def _pieces(descriptor: int, path: Path, start: int, stop: int) -> list[Piece]:
    """The bytes start..stop-1 of a file in pieces."""
    pieces = []
    while start < stop:
        end = stop
        if stop - start > PIECE_BYTES:
            end = start + PIECE_BYTES
            tail = os.pread(descriptor, _LINE_BYTES, end - _LINE_BYTES)
            newline = tail.rfind(b"\n")
            end = end - _LINE_BYTES + newline + 1 if newline >= 0 else _character_start(descriptor, end)
        pieces.append(Piece(path, start, end))
        start = end
    return pieces


def _character_start(descriptor: int, position: int) -> int:
    """The last position up to the given one, by at most three bytes, where a character of UTF-8 can begin."""
    for start in range(position, max(position - 4, -1), -1):
        byte = os.pread(descriptor, 1, start)
        if not byte or byte[0] & 0xC0 != 0x80:
            return start
    return position
