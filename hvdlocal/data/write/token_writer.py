"""Writing a stream of tokens as HDF5 shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvdlocal.communicator import succeed_together
from hvdlocal.data.format.manifest import Manifest, ShardEntry
from hvdlocal.data.kinds.tokens import CRC_ROWS, DTYPES, ROW, checked_block, rows_of
from hvdlocal.data.write.shard_writer import write_shard
from hvdlocal.data.write.split_writer import SplitWriter
from hvdlocal.data.write.staging import Receipt


class TokenSource(Protocol):
    """Token ids (N,) that can be read by slices: ndarray, memmap, h5py dataset …"""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type: uint8, uint16 or uint32."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, wanted: slice, /) -> NDArray[Any]:
        """The token ids of a slice."""


class TokenWriter(SplitWriter):
    """Writes one split of a stream of tokens as HDF5 shards, in the order of the stream. The arguments are `SplitWriter`'s."""

    def write(
        self,
        tokens: TokenSource,
        token_bytes: ArrayLike,
        *,
        block: int,
        identity: str | None = None,
        preparation: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Writes the split as `ShardWriter.write` does, and returns its manifest.

        Args:
            tokens: uint8, uint16 or uint32 (N,), token ids below V; read lazily.
            token_bytes: integers (V,), how many bytes of text each token id stands for; 0 for special tokens. With
                ones, bits per byte are bits per token.
            block: T, the length of the sequences that a reader gets unless it chooses another.
            identity: what identifies the content of `tokens`; by default a hash of all of it, for which they are read once
                more.
            preparation: facts that the manifest shall record.

        Raises:
            ValueError: the arguments do not fit that description, or there are fewer than T + 1 tokens, or too few for the
                shards.
            FileExistsError: a different data set is there and `overwrite` is not set.
        """

        def check() -> tuple[NDArray[np.uint16], str]:
            found = getattr(tokens, "dtype", None)
            if not isinstance(found, np.dtype):  # a list, or a tensor of torch
                raise ValueError(
                    f"tokens are a {type(tokens).__name__}; an array of {', '.join(DTYPES)} is needed, such as "
                    "np.asarray(tokens, np.uint16)"
                )
            if found.name not in DTYPES:
                raise ValueError(f"tokens are {found}; one of {', '.join(DTYPES)} is needed")
            if len(getattr(tokens, "shape", (1,))) != 1:
                raise ValueError(f"tokens are {tokens.dtype} {tokens.shape}; a stream has one axis")  # type: ignore[attr-defined]
            lengths = np.asarray(token_bytes)
            if lengths.ndim != 1 or not len(lengths) or lengths.dtype.kind not in "iu" or not _fits(lengths):
                raise ValueError("token_bytes must be integers (V,) from 0 to 65535, one for each token id")
            if len(tokens) <= checked_block(block):
                raise ValueError(
                    f"there are {len(tokens)} tokens, fewer than a block of {block} and the one after it; choose a smaller block"
                )
            self._require_samples(rows_of(len(tokens)), f"rows of {ROW} tokens")
            return lengths.astype(np.uint16), identity or _sha256_of_tokens(tokens)

        lengths, source = succeed_together(self._communicator, check, "data.check")
        facts = {
            "dtype": tokens.dtype.name,
            "vocabulary": len(lengths),
            "num_tokens": len(tokens),
            "block": int(block),
        }
        digest = hashlib.sha256(lengths.astype("<u2").tobytes()).hexdigest()
        draft = self._draft("tokens", facts, {"token_bytes": digest, "source": source})

        def write(path: Path, name: str, rows: NDArray[np.int64]) -> Receipt:
            text_bytes = [0]
            units = self._units(tokens, lengths, rows, text_bytes)
            sha256 = write_shard(path, draft, len(rows), [units], {"token_bytes": lengths})
            return Receipt(ShardEntry(name, len(rows), path.stat().st_size, sha256), text_bytes[0])

        return self._write_split(draft, rows_of(len(tokens)), write, preparation or {})

    def _units(
        self, tokens: TokenSource, lengths: NDArray[np.uint16], rows: NDArray[np.int64], text_bytes: list[int]
    ) -> Iterator[NDArray[Any]]:
        """The tokens of the given rows in units of CRC_ROWS; the bytes that they stand for are added up on their way."""
        for start in range(0, len(rows), CRC_ROWS):
            some = rows[start : start + CRC_ROWS]
            first = int(some[0]) * ROW
            found = np.asarray(tokens[first : min(first + len(some) * ROW, len(tokens))])
            if found.max() >= len(lengths):
                position = int(found.argmax())
                raise ValueError(
                    f"token {found[position]} at position {first + position} is not in the vocabulary of {len(lengths)}"
                )
            text_bytes[0] += int(lengths[found].sum())
            unit = np.zeros(len(some) * ROW, np.dtype(tokens.dtype).newbyteorder("<"))
            unit[: len(found)] = found
            yield unit
            self._tell(len(some))


def _fits(lengths: NDArray[Any]) -> bool:
    return bool(lengths.min() >= 0 and lengths.max() <= np.iinfo(np.uint16).max)


def _sha256_of_tokens(tokens: TokenSource) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(tokens), 1 << 22):
        digest.update(np.ascontiguousarray(tokens[start : min(start + (1 << 22), len(tokens))]).data)
    return digest.hexdigest()
